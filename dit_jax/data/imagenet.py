"""imagenet2012, as tensorflow-datasets lays it out, from the two tar files of image-net.org, without TensorFlow.

Name, version, features, splits, records and their order are those that tfds itself would write (its own builder, and
its writer for more than 1 GB, both need TensorFlow), so that anything that reads `imagenet2012` in ArrayRecord reads
it. One difference: tfds re-encodes 22 CMYK pictures and one PNG to RGB JPEG; here the bytes stay as in the tar files.
"""

import collections
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from dit_jax.data.decode import MAX_BYTES
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import check_regular, reading, write_aside
from dit_jax.runtime.progress import Progress, say

TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
COUNTS = {"train": 1_281_167, "validation": 50_000}

Picture = collections.namedtuple("Picture", "name label offset size")  # offset and size: where it lies in the tar file


def _members(path, start=0, end=None):
    """The files in a tar that lies from `start` to `end` in the file `path` -> [(name, offset in `path`, size)]. Raises
    UserError where it is not whole."""
    end = os.path.getsize(path) if end is None else end
    what = path if start == 0 else f"{path}, the tar within at byte {start}"
    members = []
    with reading(what, "a tar file", "cannot be read as a tar file ({reason}): cut short, or no tar: fetch it again"):
        check_regular(path)
        with open(path, "rb") as f:
            f.seek(start)
            archive = tarfile.open(fileobj=f, mode="r:")
            while member := archive.next():
                # Python's reader goes back, or round and round, where a size tells it to.
                if member.size < 0 or archive.offset <= member.offset or member.offset_data + member.size > end:
                    raise UserError(f"{what}: is cut short or damaged at byte {member.offset}: fetch it again")
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None:
                    members.append((member.name, member.offset_data, member.size))
            # Nor does it say so at a header that is damaged or cut short.
            f.seek(archive.offset)
            rest = f.read(min(512, max(0, end - archive.offset)))
            whole = archive.offset <= end and not rest.strip(b"\0") and len(rest) in (0, 512)
    if not whole:
        raise UserError(f"{what}: is cut short or damaged at byte {archive.offset}: fetch it again")
    return members


def _train(path, labels):
    tars, known = _members(path), set(labels)
    for name, _, _ in tars:
        if name.removesuffix(".tar") not in known:
            raise UserError(f"{path}: holds {repr(name)[:99]}, where a tar for each class is expected, e.g. {labels[0]}.tar")
    progress, pictures = Progress("reading the contents", len(tars), "tars"), []
    with ThreadPoolExecutor() as pool:
        for i, members in enumerate(pool.map(lambda tar: _members(path, tar[1], tar[1] + tar[2]), tars)):
            label = tars[i][0].removesuffix(".tar")
            pictures += [Picture(os.path.basename(name), label, offset, size) for name, offset, size in members]
            progress.update(i + 1)
    progress.close()
    return pictures


def _validation(path, labels):
    pictures = []
    for name, offset, size in _members(path):
        name = os.path.basename(name)
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not number or not 1 <= int(number[1]) <= len(labels):
            raise UserError(f"{path}: holds {repr(name)[:99]}, where ILSVRC2012_val_00000001.JPEG to _{len(labels):08d}.JPEG "
                            "are expected")
        pictures.append(Picture(name, labels[int(number[1]) - 1], offset, size))
    return pictures


def contents(tars, partial):
    """What the tar files in a folder hold -> {split: [Picture]}. UserError where one is missing, cut short, or holds
    another number of pictures than ILSVRC2012; with `partial`, what is there is taken."""
    import tensorflow_datasets as tfds
    classes = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    of_validation = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    found = {}
    for split, name in TARS.items():
        path = os.path.join(tars, name)
        if not os.path.isfile(path):
            if partial:
                continue
            raise UserError(f"{path}: no such file: fetch it from https://image-net.org/download-images, or take what "
                            "is there with --partial")
        found[split] = _train(path, classes) if split == "train" else _validation(path, of_validation)
        if len(found[split]) != COUNTS[split] and not partial:
            raise UserError(f"{path}: holds {len(found[split]):,} pictures, ILSVRC2012 has {COUNTS[split]:,}: fetch it "
                            "again, or take what is there with --partial")
        if large := next((p for p in found[split] if p.size > MAX_BYTES), None):
            raise UserError(f"{path}: holds {repr(large.name)[:99]} of {large.size:,} bytes, more than a picture has")
        names = collections.Counter(p.name for p in found[split])
        if len(names) != len(found[split]):
            raise UserError(f"{path}: holds {repr(names.most_common(1)[0][0])[:99]} more than once")
    if not any(found.values()):
        raise UserError(f"{tars}: holds neither {' nor '.join(TARS.values())} with pictures in it")
    return {split: pictures for split, pictures in found.items() if pictures}


def _write_shard(path, pictures, tar, classes, pool):
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
            example = tf_example_pb2.Example()
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


def prepare(tars, data_dir, partial=False):
    """Writes DATA_DIR/imagenet2012/VERSION, and returns that path. Nothing is unpacked: the pictures are read from the
    tar files in the order in which they are written. Shards are written aside, into a folder that gets its name when
    all is there; the same call goes on after a kill, with the shards that are whole. UserError says what is wrong."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import hashing, naming
    from tensorflow_datasets.core.splits import SplitDict
    from tensorflow_datasets.core.utils import shard_utils

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
        # tfds makes a folder in the system's temporary one, and leaves it there.
        builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    out = builder.data_dir
    classes = {name: label for label, name in enumerate(builder.info.features["label"].names)}
    if os.path.exists(out):
        raise UserError(f"{out}: is there already: remove it to prepare it anew")
    splits, digest = contents(tars, partial), hashlib.sha256()
    for split, pictures in splits.items():
        # The order that tfds gives the records.
        hasher = hashing.Hasher(split)
        pictures.sort(key=lambda p: hasher.hash_key(p.name))
        for picture in pictures:
            digest.update(f"{split} {picture}\n".encode())
        say(f"{split}: {len(pictures):,} pictures" + (f", where ILSVRC2012 has {COUNTS[split]:,}"
                                                      if len(pictures) != COUNTS[split] else ""))
    work = f"{out}.incomplete"
    plan = os.path.join(work, "plan.txt")
    if os.path.exists(plan):
        with open(plan) as f:
            if f.read() != digest.hexdigest():
                raise UserError(f"{work}: was begun with other tar files: remove it, or put those back")
    write_aside(plan, digest.hexdigest().encode())
    layouts = {}
    for split, pictures in splits.items():
        template = naming.ShardedFileTemplate(dataset_name="imagenet2012", data_dir=work, split=split,
                                              filetype_suffix="array_record")
        size = sum(p.size for p in pictures)
        count = shard_utils.ShardConfig().get_number_shards(size, len(pictures))
        ends = shard_utils.get_shard_boundaries(len(pictures), count)
        shards = [(str(template.sharded_filepath(shard_index=i, num_shards=count)), pictures[start:end])
                  for i, (start, end) in enumerate(zip([0, *ends], ends))]
        layouts[split] = template, size, shards
    missing = sum(p.size for _, _, shards in layouts.values() for path, part in shards
                  if not os.path.exists(path) for p in part)
    free = shutil.disk_usage(work).free
    if free < missing * 1.01:
        raise UserError(f"--path={data_dir}: {missing / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")
    total, done = sum(map(len, splits.values())), 0
    progress = Progress("writing", total, "pictures")
    with ThreadPoolExecutor(16) as pool:
        for split, (_, _, shards) in layouts.items():
            with open(os.path.join(tars, TARS[split]), "rb") as tar:
                for path, part in shards:
                    if not os.path.exists(path):
                        progress.update(done)
                        _write_shard(path, part, tar, classes, pool)
                    done += len(part)
    progress.close()
    builder.info.set_splits(SplitDict([
        tfds.core.SplitInfo(name=split, shard_lengths=[len(part) for _, part in shards], num_bytes=size,
                            filename_template=template) for split, (template, size, shards) in layouts.items()]))
    builder.info.write_to_directory(work)
    os.rename(work, out)
    os.remove(os.path.join(out, "plan.txt"))
    return str(out)
