"""Pictures as they lie in files: raw records, and the training source of cropped pictures made from them.

Raw records have `len(raw)`, `raw[i] -> (name, data: bytes of a picture file, label: int)`, `raw.identity`,
`raw.class_names`, `raw.num_classes`. Pictures(raw, size) is a training source.
"""

import collections
import hashlib
import os
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dit_jax.data import images
from dit_jax.data.images import BadImage
from dit_jax.data.latents import allow_open_files, empty
from dit_jax.logging import say
from dit_jax.runtime.files import check_regular, reading


def _entries(folder):
    """(folders, files) in a folder as sorted os.DirEntry; hidden ones are left out."""
    try:
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        folders = [e for e in entries if e.is_dir()]
    except OSError as e:
        raise ValueError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    loops = [e.path for e in folders if e.is_symlink() and
             os.path.realpath(folder).startswith(os.path.join(os.path.realpath(e.path), ""))]
    if loops:
        raise ValueError(f"{loops[0]}: a link to a folder that holds it")
    return folders, [e for e in entries if not e.is_dir()]


def _files(folder):
    """Every file in a folder and the folders in it."""
    waiting = [folder]
    while waiting:
        folders, files = _entries(waiting.pop())
        yield from files
        waiting += [inner.path for inner in folders]


def _is_picture(name):
    return os.path.splitext(name)[1].lower() in images.EXTENSIONS


class Folder:
    """Raw records of a folder of class folders: the folders, sorted by name, are the classes 0, 1, ...; all picture
    files in one, also further down, are its examples, sorted by path. Hidden files are left out, other files counted
    (`others`: how many by extension) and said.

    The identity is a hash over names and sizes of the files. Raises ValueError, one line, where there is no such
    folder, no class folder, or a class folder without pictures: it may have been left empty by a copy cut short, and
    to leave it out would change the labels of those after it.
    """

    def __init__(self, path):
        if not os.path.isdir(path):
            problem = "not a folder" if os.path.exists(path) else "no such folder"
            raise ValueError(f"{path!r}: {problem}: name a folder that holds one folder of pictures for each class")
        self.path, self.files, self.others = os.path.join(path, ""), [], collections.Counter()
        classes, beside = _entries(self.path)
        self.class_names = [c.name for c in classes]
        if not classes:
            raise ValueError(f"{path}: holds no class folders: each class's pictures belong in a folder of its own")
        digest, ends = hashlib.sha256(), []
        for folder in classes:
            found = []
            for entry in _files(folder.path):
                self._take(entry, found)
            if not found:
                raise ValueError(f"{folder.path}: a class folder without pictures ({', '.join(images.EXTENSIONS)}): "
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
            raise ValueError(f"{entry.path}: cannot be read ({e.strerror})") from None
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise ValueError(f"{entry.path}: not a file but a pipe, socket or device: remove it")
        if status.st_size > images.MAX_BYTES:
            raise ValueError(f"{entry.path}: of {status.st_size:,} bytes, more than the {images.MAX_BYTES:,} that a picture "
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

    The identity is a hash over the split's shards, their sizes and numbers of records. Raises ValueError, one line,
    where the set, the split, a feature or a shard is missing; at reading, where a shard is damaged, naming it.
    """

    def __init__(self, name, split, data_dir):
        import tensorflow_datasets as tfds  # takes seconds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        builder = self._builder(name, data_dir)
        where = builder.data_dir
        kind = builder.info.file_format and builder.info.file_format.value
        if kind != "array_record":
            raise ValueError(f"{where}: is in the format {kind}: prepare it anew, in another data_dir, with {_PREPARE}")
        features = builder.info.features
        for key, wanted in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
            if key not in features or not isinstance(features[key], wanted):
                raise ValueError(f"{where}: has no feature {key!r} of the kind {wanted.__name__}; its features: "
                                 f"{', '.join(f'{k}: {type(f).__name__}' for k, f in features.items())}")
        try:
            shards = builder.info.splits[split].file_instructions
        except Exception:  # whatever tfds makes of what a user wrote
            raise ValueError(f"{where}: has no split {split!r}; it has {', '.join(builder.info.splits)}") from None
        if not shards:
            raise ValueError(f"{where}: the split {split!r} is empty")
        digest = hashlib.sha256()
        for shard in shards:
            check_regular(shard.filename)
            try:
                size = os.path.getsize(shard.filename)
            except OSError as e:
                raise ValueError(f"{shard.filename}: a shard of {name}'s {split} that cannot be read ({e.strerror})"
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
            raise ValueError(f"{data_dir!r}: no such folder; it should hold the data set {name!r}; {hint}")
        from tensorflow_datasets.core import read_only_builder, registered
        try:
            # By files alone: tfds.data_source would make folders and go to the network for a set that is not there.
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        except registered.DatasetNotFoundError:
            raise ValueError(f"{data_dir}: holds no prepared data set {name!r}; {hint}") from None
        except Exception as e:  # damaged metadata raise nearly everything
            reason = " ".join(str(e).split()) or type(e).__name__
            raise ValueError(f"{data_dir}: the data set {name!r} cannot be opened ({reason[:200]})") from None

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
            raise ValueError(f"{file}: cannot be read ({reason[:200]}): if it is damaged, prepare it again") from None
        return names[0].decode(errors="replace") if names else f"{self.label}[{index}]", data, label


class Pictures:
    """Training source: raw records decoded, upright, centre-cropped to size x size; x is uint8 (n, size, size, 3).

    A broken picture is replaced by the next readable one (index + 1, ...), kept in `skipped` {name: reason} and said
    once on stderr; more than `max_skipped` of them raise ValueError. What stands for a broken one depends on the index
    alone, so that all hosts and runs agree.
    """

    can_flip = True

    def __init__(self, raw, size, max_skipped=100):
        self.raw, self.size, self.max_skipped = raw, size, max_skipped
        self.class_names, self.num_classes = raw.class_names, raw.num_classes
        self.identity = f"{raw.identity}:{size}px"
        self.skipped = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count() + 1)  # of more, each waits longer for the interpreter's lock

    def __len__(self):
        return len(self.raw)

    def read(self, index):
        """-> (uint8 (size, size, 3), label). Raises BadImage("NAME: reason"), ValueError where a file is gone."""
        name, data, label = self.raw[index]
        try:
            return images.center_crop(images.decode(data), self.size), label
        except BadImage as e:
            raise BadImage(e.reason, name) from None

    def _skip(self, error):
        with self._lock:
            if error.name in self.skipped:
                return
            self.skipped[error.name] = error.reason
            if len(self.skipped) > self.max_skipped:
                raise ValueError(f"{len(self.skipped)} pictures cannot be used, more than max_skipped="
                                 f"{self.max_skipped}; the last: {error}")
            print(f"skipped {len(self.skipped)} of at most {self.max_skipped}: {error}", file=sys.stderr, flush=True)

    def _readable(self, index):
        for i in range(index, index + len(self)):
            try:
                return self.read(i % len(self))
            except BadImage as e:
                self._skip(e)
        raise ValueError(f"none of the {len(self)} pictures can be used, e.g. {next(iter(self.skipped.items()))}")

    def examples(self, indices, flips):
        """-> {"x": uint8 (n, size, size, 3), "y": int32 (n,)}, decoded in threads; flips mirror left to right."""
        x, y = empty((len(indices), self.size, self.size, 3), np.uint8), np.empty(len(indices), np.int32)

        def read(row, index, flip):
            image, y[row] = self._readable(int(index))
            x[row] = image[:, ::-1] if flip else image

        for _ in self._pool.map(read, range(len(x)), indices, flips):
            pass
        return {"x": x, "y": y}

    def present(self, indices):
        """-> uint8 (n, size, size, 3): the pictures at these indices, those left out that cannot be used."""
        def read(index):
            try:
                return self.read(index)[0]
            except BadImage as e:
                self._skip(e)

        found = [x for x in self._pool.map(read, [int(i) for i in indices]) if x is not None]
        return np.stack(found) if found else np.empty((0, self.size, self.size, 3), np.uint8)
