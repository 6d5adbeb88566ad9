"""Prepares imagenet2012 from the two tar files of image-net.org as tensorflow-datasets does, but without TensorFlow.

Name, version, features, splits, records and their order are those that tfds itself writes, so that anything that reads
`imagenet2012` in ArrayRecord reads the result. (Both tfds's builder of it and tfds's writer for more than 1 GB need
TensorFlow.) One difference: tfds re-encodes 22 CMYK pictures and one PNG to RGB JPEG; here the bytes stay as they are
in the tar files.
"""

import collections
import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple
from unittest import mock

from dit_jax.data.decode import MAX_BYTES
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import check_regular, check_room, reading, write_aside
from dit_jax.runtime.progress import Progress, say

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
COUNTS = {"train": 1_281_167, "validation": 50_000}


class Picture(NamedTuple):
    """A picture file of `size` bytes, at `offset` in a tar file. label: its WordNet ID."""

    name: str
    label: str
    offset: int
    size: int


@dataclass
class _Split:
    """How a split is written. template: tfds's file name template. shards: (path, pictures) of each."""

    template: Any
    num_bytes: int
    shards: list[tuple[str, list[Picture]]]


def _members(path: str, start: int = 0, end: int | None = None) -> list[tuple[str, int, int]]:
    """Returns (name, offset in `path`, size) of each file in the tar that fills bytes `start` to `end` of `path`.

    Raises UserError if the tar is cut short or damaged.
    """
    end = os.path.getsize(path) if end is None else end
    what = path if start == 0 else f"{path}, the tar within at byte {start}"
    members = []
    with reading(what, "a tar file", "cannot be read as a tar file ({reason}): cut short, or no tar: fetch it again"):
        check_regular(path)
        with open(path, "rb") as f:
            f.seek(start)
            archive = tarfile.open(fileobj=f, mode="r:")
            while member := archive.next():
                # A wrong size can send Python's reader backwards or in circles.
                if member.size < 0 or archive.offset <= member.offset or member.offset_data + member.size > end:
                    raise UserError(f"{what}: is cut short or damaged at byte {member.offset}: fetch it again")
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
                    members.append((member.name, member.offset_data, member.size))
            # At a header that is damaged or cut short the reader stops as it does at the end.
            f.seek(archive.offset)
            rest = f.read(min(512, max(0, end - archive.offset)))
            complete = archive.offset <= end and not rest.strip(b"\0") and len(rest) in (0, 512)
    if not complete:
        raise UserError(f"{what}: is cut short or damaged at byte {archive.offset}: fetch it again")
    return members


def _train(path: str, labels: Sequence[str]) -> list[Picture]:
    """Returns the pictures of the training tar, which holds one tar for each class."""
    tars, known = _members(path), set(labels)
    for name, _, _ in tars:
        if name.removesuffix(".tar") not in known:
            expected = f"where a tar for each class is expected, e.g. {labels[0]}.tar"
            raise UserError(f"{path}: holds {repr(name)[:99]}, {expected}")
    progress, pictures = Progress("reading the contents", len(tars), "tars"), []
    with ThreadPoolExecutor() as pool:
        for i, members in enumerate(pool.map(lambda tar: _members(path, tar[1], tar[1] + tar[2]), tars)):
            label = tars[i][0].removesuffix(".tar")
            pictures += [Picture(os.path.basename(name), label, offset, size) for name, offset, size in members]
            progress.update(i + 1)
    progress.close()
    return pictures


def _validation(path: str, labels: Sequence[str]) -> list[Picture]:
    """Returns the pictures of the validation tar; labels: the label of each, by its number."""
    pictures = []
    for name, offset, size in _members(path):
        name = os.path.basename(name)
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not number or not 1 <= int(number[1]) <= len(labels):
            expected = f"where ILSVRC2012_val_00000001.JPEG to _{len(labels):08d}.JPEG are expected"
            raise UserError(f"{path}: holds {repr(name)[:99]}, {expected}")
        pictures.append(Picture(name, labels[int(number[1]) - 1], offset, size))
    return pictures


def contents(tars: str, partial: bool) -> dict[str, list[Picture]]:
    """Returns the pictures of each split in the tar files of a folder.

    Raises UserError if a tar file is missing, cut short, or holds another number of pictures than ILSVRC2012. With
    `partial`, one tar file or fewer pictures are enough.
    """
    import tensorflow_datasets as tfds

    classes = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    of_validation = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    splits = {}
    for split, name in TARS.items():
        path = os.path.join(tars, name)
        if not os.path.isfile(path):
            if partial:
                continue
            raise UserError(
                f"{path}: no such file: download it from https://image-net.org/download-images, or use only the "
                "existing tar file with --partial"
            )
        pictures = _train(path, classes) if split == "train" else _validation(path, of_validation)
        if len(pictures) != COUNTS[split] and not partial:
            raise UserError(
                f"{path}: holds {len(pictures):,} pictures, ILSVRC2012 has {COUNTS[split]:,}: fetch it again, or use "
                "only these pictures with --partial"
            )
        if large := next((p for p in pictures if p.size > MAX_BYTES), None):
            raise UserError(f"{path}: holds {repr(large.name)[:99]} of {large.size:,} bytes, more than a picture has")
        names = collections.Counter(p.name for p in pictures)
        if len(names) != len(pictures):
            raise UserError(f"{path}: holds {repr(names.most_common(1)[0][0])[:99]} more than once")
        if pictures:
            splits[split] = pictures
    if not splits:
        raise UserError(f"{tars}: holds neither {' nor '.join(TARS.values())} with pictures in it")
    return splits


def _write_shard(
    path: str, pictures: Sequence[Picture], tar: BinaryIO, classes: dict[str, int], pool: ThreadPoolExecutor
) -> None:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    def read(picture):
        try:
            data = os.pread(tar.fileno(), picture.size, picture.offset)
        except OSError as e:
            raise UserError(f"{tar.name}: cannot be read ({e.strerror})") from None
        if len(data) != picture.size:
            raise UserError(f"{tar.name}: is cut short: {picture.name} is not whole")
        return data

    aside = f"{path}.part"
    try:
        writer = ArrayRecordWriter(aside, "group_size:1")
        for picture, data in zip(pictures, pool.map(read, pictures)):
            example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
            record = example.features.feature
            record["image"].bytes_list.value.append(data)
            record["label"].int64_list.value.append(classes[picture.label])
            record["file_name"].bytes_list.value.append(picture.name.encode())
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()
        reader = ArrayRecordReader(aside)
        written = reader.num_records()
        reader.close()
    except UserError:
        raise
    except (RuntimeError, OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be written ({' '.join(str(e).split())[:200]})") from None
    if written != len(pictures):
        raise UserError(f"{path}: cannot be written (it holds {written} records of {len(pictures)})")
    os.replace(aside, path)


def _sort_as_tfds(splits: dict[str, list[Picture]]) -> None:
    """Sorts the pictures of each split in place to the order of tfds's records, and reports their number."""
    from tensorflow_datasets.core import hashing

    for split, pictures in splits.items():
        hasher = hashing.Hasher(split)
        pictures.sort(key=lambda p: hasher.hash_key(p.name))
        missing = f", where ILSVRC2012 has {COUNTS[split]:,}" if len(pictures) != COUNTS[split] else ""
        say(f"{split}: {len(pictures):,} pictures{missing}")


def _begin(work: str, splits: dict[str, list[Picture]]) -> None:
    """Writes a digest of the pictures to WORK/plan.txt. Raises UserError if a different one is there."""
    digest = hashlib.sha256()
    for split, pictures in splits.items():
        for picture in pictures:
            digest.update(f"{split} {picture}\n".encode())
    plan = os.path.join(work, "plan.txt")
    if os.path.exists(plan):
        with open(plan) as f:
            if f.read() != digest.hexdigest():
                raise UserError(f"{work}: was begun with other tar files: remove it, or put those back")
    write_aside(plan, digest.hexdigest().encode())


def _layout(work: str, split: str, pictures: Sequence[Picture]) -> _Split:
    """Divides a split into shards as tfds does."""
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core.utils import shard_utils

    template = naming.ShardedFileTemplate(
        dataset_name="imagenet2012",
        data_dir=work,  # pyright: ignore[reportArgumentType]
        split=split,
        filetype_suffix="array_record",
    )
    num_bytes = sum(p.size for p in pictures)
    count = shard_utils.ShardConfig().get_number_shards(num_bytes, len(pictures))
    ends = shard_utils.get_shard_boundaries(len(pictures), count)
    shards = []
    for i, (start, end) in enumerate(zip([0, *ends], ends)):
        path = str(template.sharded_filepath(shard_index=i, num_shards=count))
        shards.append((path, list(pictures[start:end])))
    return _Split(template, num_bytes, shards)


def _write_missing(tars: str, layouts: dict[str, _Split], classes: dict[str, int]) -> None:
    """Writes the shards that do not exist yet."""
    total = sum(len(pictures) for layout in layouts.values() for _, pictures in layout.shards)
    progress, done = Progress("writing", total, "pictures"), 0
    with ThreadPoolExecutor(16) as pool:
        for split, layout in layouts.items():
            with open(os.path.join(tars, TARS[split]), "rb") as tar:
                for path, pictures in layout.shards:
                    if not os.path.exists(path):
                        progress.update(done)
                        _write_shard(path, pictures, tar, classes, pool)
                    done += len(pictures)
    progress.close()


def prepare(tars: str, data_dir: str, partial: bool = False) -> str:
    """Writes DATA_DIR/imagenet2012/VERSION and returns that path.

    Nothing is unpacked: the pictures are read from the tar files in the order in which they are written. Shards are
    written to a folder VERSION.incomplete, which is renamed when all are complete. After an interruption the same call
    resumes and keeps the complete shards. Raises UserError.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitDict

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
        # tfds creates a folder in the system's temporary folder and does not remove it.
        builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    out, info = builder.data_dir, builder.info
    features: Any = info.features
    classes = {name: label for label, name in enumerate(features["label"].names)}
    if os.path.exists(out):
        raise UserError(f"{out}: already exists: remove it to prepare it again")
    splits = contents(tars, partial)
    _sort_as_tfds(splits)
    work = f"{out}.incomplete"
    _begin(work, splits)
    layouts = {split: _layout(work, split, pictures) for split, pictures in splits.items()}
    missing = sum(
        picture.size
        for layout in layouts.values()
        for path, pictures in layout.shards
        if not os.path.exists(path)
        for picture in pictures
    )
    check_room(work, missing + missing // 100, f"--path={data_dir}")
    _write_missing(tars, layouts, classes)
    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(pictures) for _, pictures in layout.shards],
            num_bytes=layout.num_bytes,
            filename_template=layout.template,
        )
        for split, layout in layouts.items()
    ]
    info.set_splits(SplitDict(split_infos))
    info.write_to_directory(work)
    os.rename(work, out)
    os.remove(os.path.join(out, "plan.txt"))
    return str(out)
