"""Raw records: pictures as they are stored in files, not decoded."""

import collections
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from dit_jax.data import decode
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import check_regular, reading
from dit_jax.runtime.process import allow_open_files
from dit_jax.runtime.progress import say


class Records(Protocol):
    """A sequence of raw records. `identity` is a string that changes when the data change."""

    @property
    def identity(self) -> str: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        """Returns (name, bytes of the picture file, label)."""
        ...


def _scan(folder: str) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """Returns (folders, files) of a folder, each sorted by name. Hidden entries are left out."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted((e for e in scanned if not e.name.startswith(".")), key=lambda e: e.name)
        folders = [e for e in entries if e.is_dir()]
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    for link in (e.path for e in folders if e.is_symlink()):
        if os.path.realpath(folder).startswith(os.path.join(os.path.realpath(link), "")):
            raise UserError(f"{link}: a link to a folder that holds it: remove the link")
    return folders, [e for e in entries if not e.is_dir()]


def _all_files(folder: str) -> Iterator[os.DirEntry]:
    """Yields every file in a folder and in the folders below it."""
    waiting = [folder]
    while waiting:
        folders, files = _scan(waiting.pop())
        yield from files
        waiting += [inner.path for inner in folders]


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


class Folder:
    """Raw records of a folder of class folders.

    The class folders, sorted by name, are the classes 0, 1, ... The examples of a class are all picture files in its
    folder and in the folders below it, sorted by path. Hidden files are ignored. Other files are counted by extension
    in `others` and reported. The identity is a hash over the names and sizes of the picture files.

    Raises UserError if there is no such folder, if it has no class folder, or if a class folder has no pictures: a copy
    that was cut short may have left it empty, and without it the labels of the later classes would change.
    """

    def __init__(self, path: str):
        if not os.path.isdir(path):
            problem = "not a folder" if os.path.exists(path) else "no such folder"
            raise UserError(f"{path!r}: {problem}: name a folder that holds one folder of pictures for each class")
        self.path, self.files, self.others = os.path.join(path, ""), [], collections.Counter()
        classes, files_beside = _scan(self.path)
        self.class_names = [c.name for c in classes]
        if not classes:
            raise UserError(f"{path}: holds no class folders: put the pictures of each class in a folder of their own")
        digest, ends = hashlib.sha256(), []
        for folder in classes:
            pictures = self._pictures(folder)
            if not pictures:
                raise UserError(
                    f"{folder.path}: a class folder without pictures ({', '.join(decode.EXTENSIONS)}): "
                    "remove it, or complete it"
                )
            for name, size in sorted(pictures):
                digest.update(b"%s\0%d\n" % (os.fsencode(name), size))
                self.files.append(name)
            ends.append(len(self.files))
        self.ends = np.array(ends)
        self.others.update(_extension(e.name) for e in files_beside)
        self.identity = f"folder:{len(self.files)}:{len(classes)}:{digest.hexdigest()[:16]}"
        if self.others:
            kinds = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in self.others.most_common(8))
            say(f"{path}: {self.others.total()} files are left out (not pictures, or in no class folder): {kinds}")

    def _pictures(self, folder: os.DirEntry) -> list[tuple[str, int]]:
        """Returns the path below `self.path` and the size of each picture file of a class; counts the other files."""
        pictures = []
        for entry in _all_files(folder.path):
            if _extension(entry.name) not in decode.EXTENSIONS:
                self.others[_extension(entry.name)] += 1
                continue
            try:
                status = entry.stat()
            except OSError as e:
                raise UserError(f"{entry.path}: cannot be read ({e.strerror})") from None
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
                raise UserError(f"{entry.path}: not a file but a pipe, socket or device: remove it")
            if status.st_size > decode.MAX_BYTES:
                raise UserError(
                    f"{entry.path}: has {status.st_size:,} bytes, more than the {decode.MAX_BYTES:,} that a picture "
                    "may have: remove it"
                )
            pictures.append((entry.path[len(self.path) :], status.st_size))
        return pictures

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        index = range(len(self))[index]
        name = self.files[index]
        file = os.path.join(self.path, name)
        with reading(file, "a picture"), open(file, "rb") as f:
            data = f.read()
        return name, data, int(np.searchsorted(self.ends, index, side="right"))


_PREPARE = (
    "tfds.builder(NAME, data_dir=DIR, file_format='array_record').download_and_prepare() (above 1 GB that "
    "needs TensorFlow)"
)


class Tfds:
    """Raw records of a data set that tensorflow-datasets has prepared as ArrayRecord, read without TensorFlow.

    Args:
        name: the data set as tfds names it: `NAME`, `NAME/CONFIG` or `NAME:VERSION`.
        split: one of its splits, or a slice such as `train[:90%]`.
        data_dir: the folder in which it was prepared. Nothing is prepared or downloaded.

    The set must have the features `image` and `label`. Picture files are returned as they are stored, since tfds
    decodes palette PNGs to palette indices. A picture's name is the record's `file_name` if it has one, else
    `NAME/SPLIT[i]`. The identity is a hash over the split's shards, their sizes and numbers of records.

    Raises UserError if the set, the split, a feature or a shard is missing. Reading a damaged shard raises a UserError
    that names it.
    """

    def __init__(self, name: str, split: str, data_dir: str):
        import tensorflow_datasets as tfds  # takes seconds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        builder = self._builder(name, data_dir)
        folder = builder.data_dir
        kind = builder.info.file_format and builder.info.file_format.value
        if kind != "array_record":
            raise UserError(
                f"{folder}: is in the format {kind}: prepare it again, in another data_dir, with {_PREPARE}"
            )
        features: Any = builder.info.features
        for key, wanted in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
            if key not in features or not isinstance(features[key], wanted):
                others = ", ".join(f"{k}: {type(f).__name__}" for k, f in features.items())
                raise UserError(f"{folder}: has no feature {key!r} of the kind {wanted.__name__}; it has {others}")
        try:
            shards: Any = builder.info.splits[split].file_instructions
        except Exception:  # whatever tfds raises over what a user wrote
            raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(builder.info.splits)}") from None
        if not shards:
            raise UserError(f"{folder}: the split {split!r} is empty")
        digest = hashlib.sha256()
        for shard in shards:
            check_regular(shard.filename)
            try:
                size = os.path.getsize(shard.filename)
            except OSError as e:
                raise UserError(
                    f"{shard.filename}: a shard of {name}'s {split} that cannot be read ({e.strerror})"
                ) from None
            digest.update(f"{os.path.basename(shard.filename)} {size} {shard.skip} {shard.take}\n".encode())
        self.files = [shard.filename for shard in shards]
        self.ends = np.cumsum([shard.take for shard in shards])
        self._name = f"{builder.info.name}/{split}"
        allow_open_files(len(shards))
        self.records = ArrayRecordDataSource(shards)
        self.class_names = list(features["label"].names)
        self.identity = (
            f"tfds:{builder.info.full_name}:{split}:{len(self)}:{self.num_classes}:{digest.hexdigest()[:16]}"
        )

    @staticmethod
    def _builder(name: str, data_dir: str):
        hint = f"imagenet2012 is prepared by python -m dit_jax.prepare; others by {_PREPARE}"
        if not os.path.isdir(data_dir):
            raise UserError(f"{data_dir!r}: no such folder; it should hold the data set {name!r}; {hint}")
        from tensorflow_datasets.core import read_only_builder, registered

        try:
            # tfds.data_source would create folders and access the network for a set that is missing.
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        except registered.DatasetNotFoundError:
            raise UserError(f"{data_dir}: holds no prepared data set {name!r}; {hint}") from None
        except Exception as e:  # damaged metadata raise nearly every exception
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"{data_dir}: the data set {name!r} cannot be opened ({reason[:200]})") from None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        from tensorflow_datasets.proto import tf_example_pb2

        index = range(len(self))[index]
        try:
            example = tf_example_pb2.Example.FromString(self.records[index])  # pyright: ignore[reportAttributeAccessIssue]
            features = example.features.feature
            data, label = features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
            names = features["file_name"].bytes_list.value
        except Exception as e:  # of the reader or of the parser
            file = self.files[np.searchsorted(self.ends, index, side="right")]
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"{file}: cannot be read ({reason[:200]}): if it is damaged, prepare it again") from None
        return names[0].decode(errors="replace") if names else f"{self._name}[{index}]", data, label
