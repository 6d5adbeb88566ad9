"""Files and folders that a command writes: whole or not at all, by one process at a time.

Errors name the file or folder.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from dit_jax.runtime import ending
from dit_jax.runtime.errors import ADVICE, UserError, chain, first_line

LOCK, PROBE = ".dit_jax.lock", ".dit_jax.probe"


def user_path(text: str) -> str:
    """Returns a path that the user wrote, with "~" expanded.

    Raises ValueError, without the path, if it cannot be a path of this machine.
    """
    path = os.path.expanduser(text)
    if re.match(r"(?i)[a-z][a-z0-9+.-]*:/", text):
        raise ValueError("is no path of this machine: mount the bucket (gcsfuse does that) and name the folder")
    if text and not text.strip():
        raise ValueError("is empty")
    if len(os.fsencode(path)) > 4095 or path.count("/") > 500:
        raise ValueError("is no path that a system takes: name a shorter one")
    if text == "-" or path.startswith("~"):
        raise ValueError(f"is taken for no file or folder: ./{text} is one of that name")
    return path


def check_file(path: str) -> None:
    """Raises OSError if something other than a file has this name, so that no file can be written there."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, where a file is to be written", path)
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its other end
            raise OSError(errno.EINVAL, "is a pipe, socket or device, where a file is to be written", path)


def check_folder(path: str) -> None:
    """Raises OSError if `path` exists and is not a folder, or one that cannot be written to."""
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "is a file, where a folder is to be", path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def check_regular(path: str) -> None:
    """Raises UserError if the file to be read is a pipe, socket or device: opening or reading it may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: not a file but a pipe, socket or device: name a file")


@contextlib.contextmanager
def reading(path: str, what: str, says: str = "cannot be read as {what} ({reason}): is it whole?") -> Iterator[None]:
    """Turns whatever the block raises about the file `path` into a UserError that names it.

    what: what the file should be, as in "weights". says: the text after the file's name.
    """
    try:
        check_regular(path)
        yield
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:  # parsers raise nearly everything on damaged files
        reason = "".join(c if c.isprintable() else "?" for c in first_line(e))
        raise UserError(f"{path}: {says.format(what=what, reason=reason)}") from None


def check_room(folder: str, size: float, what: str) -> None:
    """Raises UserError if the disk of this folder has less than `size` bytes free. what: what needs them."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{what}: needs {size / 1e9:,.3g} GB in {folder}, where {free / 1e9:,.3g} GB are free: make room, name "
            "another folder, or ask for less"
        )


def probe(folder: str) -> None:
    """Raises OSError if no file can be created in this folder."""
    path = os.path.join(folder, PROBE)
    try:
        check_file(path)
        open(path, "wb").close()
        with contextlib.suppress(FileNotFoundError):  # another command probes it as well
            os.remove(path)
    except OSError as e:
        e.filename = folder
        raise


def read_json(path: str) -> dict[str, Any] | None:
    """Returns the dict in a JSON file; None if the file does not exist, is damaged, or holds something else."""
    try:
        with reading(path, "JSON"), open(path) as f:
            value = json.load(f)
    except UserError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Makes an OSError that the block raises name `path` if it names no file, as those of `write` do not.

    An error of another type that a library raises in place of an OSError, with its text, becomes an OSError.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        e.filename = path if e.filename is None else e.filename
        raise
    except Exception as e:
        text = " ".join(map(str, chain(e)))
        number = next((number for number in ADVICE if os.strerror(number) in text), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), path) from e


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file that is renamed to `path` when the block ends without an error: `path` is always whole.

    Raises OSError naming the path; UserError if another process is writing it.
    """
    path = os.fspath(path)
    aside = f"{path}.part"
    with naming(path):
        check_file(path)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        f = open_locked(aside)
        if f is None:
            raise UserError(f"{path}: another process is writing it: wait for its end, or name another file")
        with f:
            try:
                f.truncate()
                yield f
                f.flush()
                os.close(os.dup(f.fileno()))  # some network file systems report a full disk when a file is closed
                os.replace(aside, path)
            except BaseException:
                os.remove(aside)
                raise


def write_aside(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file in such a way that the file at `path` is always whole. Raises what `writing` raises."""
    with writing(path) as f:
        f.write(data)


def append(path: str, data: bytes) -> None:
    """Appends bytes to a file. If there is no room for all of them, the file stays as it was. Raises OSError."""
    check_file(path)
    with naming(path), open(path, "ab", buffering=0) as f:
        size = f.tell()
        try:
            while data:
                data = data[f.write(data) :]
        except OSError:
            f.truncate(size)
            raise


def open_locked(path: str) -> BinaryIO | None:
    """Opens the file `path` to write, created if it does not exist, and locks it until it is closed.

    Returns None if another process has the lock. On a file system without locks nothing is locked.
    """
    for _ in range(10):
        check_file(path)
        f = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.close()
            return None
        except OSError:
            return f
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()  # the process that had the lock has just renamed or removed the file
    return None


@contextlib.contextmanager
def hold(folder: str, flag: str) -> Iterator[None]:
    """Keeps other commands from writing in this folder until the block or this process ends.

    The first of several hosts holds it for all. flag: the flag that names the folder. Raises UserError naming the
    process that holds the folder.
    """
    import jax

    if jax.process_index():
        yield
        return
    path = os.path.join(folder, LOCK)
    with naming(path):
        for _ in range(20):  # the holder may be about to write its name, or to let go
            f = open_locked(path)
            holder = None if f else _holder(path)
            if f or holder:
                break
            time.sleep(0.05)
        if f is None:
            raise UserError(
                f"--{flag}={folder}: {holder or 'another process'} is writing there: wait for its end, or name "
                "another folder"
            )
        f.truncate()
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        f.write(json.dumps({"host": platform.node(), "process": os.getpid(), "since": now}).encode())
        f.flush()
    if weakness := _lock_weakness(f, folder):
        print(f"{folder}: {weakness}: make sure that no other host runs a command that writes there", flush=True)

    def release():
        with contextlib.suppress(OSError):  # the folder may have been removed
            os.remove(path)
        f.close()

    ending.at_end.append(release)
    try:
        yield
    finally:
        ending.at_end.remove(release)
        release()


def _holder(path):
    """Returns who holds the lock of this file, as the holder wrote it there, or None."""
    try:
        with open(path, "rb") as f:
            holder = json.load(f)
        return f"process {holder['process']} on host {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock_weakness(f, folder):
    """Returns why a lock on the file `f` in `folder` does not keep other hosts away, or None if it does."""
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return "this file system has no locks"
    kinds = {}
    with contextlib.suppress(OSError), open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, point, kind, *_ = line.split(" ")
            kinds[point.replace("\\040", " ")] = kind
    inside = [point for point in kinds if os.path.realpath(folder).startswith(os.path.join(point, ""))]
    kind = kinds[max(inside, key=len)] if inside else ""
    return f"locks on {kind} do not reach other hosts" if kind.startswith("fuse") else None
