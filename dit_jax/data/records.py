"""Raw records: pictures as they are stored in files.

Raw records have `len(raw)`, `raw[i] -> (name, data: bytes of a picture file, label: int)`, `raw.identity`,
`raw.class_names`, `raw.num_classes`.
"""

import collections
import hashlib
import os
import stat

import numpy as np

from dit_jax.data import decode
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import check_regular, reading
from dit_jax.runtime.process import allow_open_files
from dit_jax.runtime.progress import say


def _entries(folder):
    """(folders, files) in a folder as sorted os.DirEntry; hidden ones are left out."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        folders = [e for e in entries if e.is_dir()]
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    loops = [e.path for e in folders if e.is_symlink() and
             os.path.realpath(folder).startswith(os.path.join(os.path.realpath(e.path), ""))]
    if loops:
        raise UserError(f"{loops[0]}: a link to a folder that holds it")
    return folders, [e for e in entries if not e.is_dir()]


def _files(folder):
    """Every file in a folder and the folders in it."""
    waiting = [folder]
    while waiting:
        folders, files = _entries(waiting.pop())
        yield from files
        waiting += [inner.path for inner in folders]


def _is_picture(name):
    return os.path.splitext(name)[1].lower() in decode.EXTENSIONS


class Folder:
    """Raw records of a folder of class folders: the folders, sorted by name, are the classes 0, 1, ...; all picture
    files in one, also further down, are its examples, sorted by path. Hidden files are left out, other files counted
    (`others`: how many by extension) and said.

    The identity is a hash over names and sizes of the files. Raises UserError, one line, where there is no such
    folder, no class folder, or a class folder without pictures: it may have been left empty by a copy cut short, and
    to leave it out would change the labels of those after it.
    """

    def __init__(self, path):
        if not os.path.isdir(path):
            problem = "not a folder" if os.path.exists(path) else "no such folder"
            raise UserError(f"{path!r}: {problem}: name a folder that holds one folder of pictures for each class")
        self.path, self.files, self.others = os.path.join(path, ""), [], collections.Counter()
        classes, beside = _entries(self.path)
        self.class_names = [c.name for c in classes]
        if not classes:
            raise UserError(f"{path}: holds no class folders: each class's pictures belong in a folder of its own")
        digest, ends = hashlib.sha256(), []
        for folder in classes:
            found = []
            for entry in _files(folder.path):
                self._take(entry, found)
            if not found:
                raise UserError(f"{folder.path}: a class folder without pictures ({', '.join(decode.EXTENSIONS)}): "
                                 "remove it, or complete it")
            for name, size in sorted(found):
                digest.update(b"%s\0%d\n" % (os.fsencode(name), size))
                self.files.append(name)
            ends.append(len(self.files))
        self.ends = np.array(ends)
        self.others.update(os.path.splitext(e.name)[1].lower() for e in beside)
        self.identity = f"folder:{len(self.files)}:{len(classes)}:{digest.hexdigest()[:16]}"
        if self.others:
            kinds = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in self.others.most_common(8))
            say(f"{path}: {self.others.total()} files are left out, being no pictures or in no class folder: {kinds}")

    def _take(self, entry, found):
        if not _is_picture(entry.name):
            self.others[os.path.splitext(entry.name)[1].lower()] += 1
            return
        try:
            status = entry.stat()
        except OSError as e:
            raise UserError(f"{entry.path}: cannot be read ({e.strerror})") from None
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise UserError(f"{entry.path}: not a file but a pipe, socket or device: remove it")
        if status.st_size > decode.MAX_BYTES:
            raise UserError(f"{entry.path}: of {status.st_size:,} bytes, more than the {decode.MAX_BYTES:,} that a picture "
                             "may have: remove it")
        found.append((entry.path[len(self.path):], status.st_size))

    @property
    def num_classes(self):
        return len(self.class_names)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        index = range(len(self))[index]
        name = self.files[index]
        file = os.path.join(self.path, name)
        with reading(file, "a picture"), open(file, "rb") as f:
            data = f.read()
        return name, data, int(np.searchsorted(self.ends, index, side="right"))


_PREPARE = ("tfds.builder(NAME, data_dir=DIR, file_format='array_record').download_and_prepare() (above 1 GB that "
            "needs TensorFlow)")


class Tfds:
    """Raw records of a data set that tensorflow-datasets has prepared as ArrayRecord, read without TensorFlow.

    name: as tfds says it, `NAME`, `NAME/CONFIG` or `NAME:VERSION`; split: one of its splits, or a slice such as
    `train[:90%]`; data_dir: the folder in which it was prepared. It must have the features `image` and `label`. The
    pictures' bytes are handed on as they were stored: tfds's own decoding gives palette indices for palette PNGs. A
    picture's name is the record's `file_name`, where it has one, else `NAME/SPLIT[i]`. Nothing is prepared or fetched.

    The identity is a hash over the split's shards, their sizes and numbers of records. Raises UserError, one line,
    where the set, the split, a feature or a shard is missing; at reading, where a shard is damaged, naming it.
    """

    def __init__(self, name, split, data_dir):
        import tensorflow_datasets as tfds  # takes seconds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        builder = self._builder(name, data_dir)
        where = builder.data_dir
        kind = builder.info.file_format and builder.info.file_format.value
        if kind != "array_record":
            raise UserError(f"{where}: is in the format {kind}: prepare it anew, in another data_dir, with {_PREPARE}")
        features = builder.info.features
        for key, wanted in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
            if key not in features or not isinstance(features[key], wanted):
                raise UserError(f"{where}: has no feature {key!r} of the kind {wanted.__name__}; its features: "
                                 f"{', '.join(f'{k}: {type(f).__name__}' for k, f in features.items())}")
        try:
            shards = builder.info.splits[split].file_instructions
        except Exception:  # whatever tfds makes of what a user wrote
            raise UserError(f"{where}: has no split {split!r}; it has {', '.join(builder.info.splits)}") from None
        if not shards:
            raise UserError(f"{where}: the split {split!r} is empty")
        digest = hashlib.sha256()
        for shard in shards:
            check_regular(shard.filename)
            try:
                size = os.path.getsize(shard.filename)
            except OSError as e:
                raise UserError(f"{shard.filename}: a shard of {name}'s {split} that cannot be read ({e.strerror})"
                                 ) from None
            digest.update(f"{os.path.basename(shard.filename)} {size} {shard.skip} {shard.take}\n".encode())
        self.files = [shard.filename for shard in shards]
        self.ends = np.cumsum([shard.take for shard in shards])
        self.label = f"{builder.info.name}/{split}"
        allow_open_files(len(shards))
        self.records = ArrayRecordDataSource(shards)
        self.class_names = list(features["label"].names)
        self.identity = (f"tfds:{builder.info.full_name}:{split}:{len(self)}:{self.num_classes}:"
                         f"{digest.hexdigest()[:16]}")

    @staticmethod
    def _builder(name, data_dir):
        hint = f"imagenet2012 is prepared by python -m dit_jax.prepare; others by {_PREPARE}"
        if not os.path.isdir(data_dir):
            raise UserError(f"{data_dir!r}: no such folder; it should hold the data set {name!r}; {hint}")
        from tensorflow_datasets.core import read_only_builder, registered
        try:
            # By files alone: tfds.data_source would make folders and go to the network for a set that is not there.
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        except registered.DatasetNotFoundError:
            raise UserError(f"{data_dir}: holds no prepared data set {name!r}; {hint}") from None
        except Exception as e:  # damaged metadata raise nearly everything
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"{data_dir}: the data set {name!r} cannot be opened ({reason[:200]})") from None

    @property
    def num_classes(self):
        return len(self.class_names)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        from tensorflow_datasets.proto import tf_example_pb2

        index = range(len(self))[index]
        try:
            features = tf_example_pb2.Example.FromString(self.records[index]).features.feature
            data, label = features["image"].bytes_list.value[0], features["label"].int64_list.value[0]
            names = features["file_name"].bytes_list.value
        except Exception as e:  # of the reader or of the parser
            file = self.files[np.searchsorted(self.ends, index, side="right")]
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"{file}: cannot be read ({reason[:200]}): if it is damaged, prepare it again") from None
        return names[0].decode(errors="replace") if names else f"{self.label}[{index}]", data, label
