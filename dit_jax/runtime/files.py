"""Files and folders that a command writes: whole or not at all, by one process at a time, with errors that name them."""

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

from dit_jax.runtime import ending
from dit_jax.runtime.errors import ADVICE, UserError, chain, first_line

LOCK, PROBE = ".dit_jax.lock", ".dit_jax.probe"


def user_path(text):
    """A path as a user writes it, "~" being the home folder. Raises ValueError where it cannot be one of this machine."""
    path = os.path.expanduser(text)
    if re.match(r"(?i)[a-z][a-z0-9+.-]*:/", text):
        raise ValueError("is no path of this machine: mount the bucket (gcsfuse does that) and name the folder")
    if text and not text.strip() or len(os.fsencode(path)) > 4095 or path.count("/") > 500:
        raise ValueError("is no path that a system takes: name a shorter one" if text.strip() else "is empty")
    if text == "-" or path.startswith("~"):
        raise ValueError(f"is taken for no file or folder: ./{text} is one of that name")
    return path


def check_file(path):
    """OSError where no file can be written under this name because something else stands there. To open a pipe would
    wait for its other end."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, where a file is to be written", path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is a pipe, socket or device, where a file is to be written", path)


def check_folder(path):
    """OSError where `path` is there, but is no folder or cannot be written to."""
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "is a file, where a folder is to be", path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def check_regular(path):
    """UserError where the file to be read is a pipe, socket or device: to open one may wait for its other end, and to read
    it may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: not a file but a pipe, socket or device: name a file")


@contextlib.contextmanager
def reading(path, what, says="cannot be read as {what} ({reason}): is it whole?"):
    """Whatever the block raises over a file that may hold anything becomes a UserError that names it. what: what the file
    is to be, as in "weights"; says: the text behind its name."""
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


def check_room(folder, size, what):
    """UserError where `size` bytes more do not fit on the disk that holds this folder. what: what asks for them."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{what}: needs {size / 1e9:,.3g} GB in {folder}, where {free / 1e9:,.3g} GB are free: make room, name "
                        "another folder, or ask for less")


def probe(folder):
    """OSError where no file can be made in this folder."""
    path = os.path.join(folder, PROBE)
    try:
        check_file(path)
        open(path, "wb").close()
        with contextlib.suppress(FileNotFoundError):  # another command looks as well
            os.remove(path)
    except OSError as e:
        e.filename = folder
        raise


def read_json(path):
    """The dict in a JSON file, or None where there is none: no file, a damaged one, or something else."""
    try:
        with reading(path, "JSON"), open(path) as f:
            value = json.load(f)
    except UserError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def naming(path):
    """An OSError that does not say which file it is of, as those of `write` do not, is of `path`. Libraries raise others in
    the place of one, with its text somewhere in theirs: these become OSErrors."""
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
def writing(path):
    """A binary file that gets the name `path` when the block ends well: whatever happens, what lies there is whole.
    Raises OSError naming the path; UserError where another process is writing it."""
    path = os.fspath(path)
    aside = f"{path}.part"
    with naming(path):
        check_file(path)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        f = _open_alone(aside)
        if f is None:
            raise UserError(f"{path}: another process is writing it: wait for its end, or name another file")
        with f:
            try:
                f.truncate()
                yield f
                f.flush()
                os.close(os.dup(f.fileno()))  # some network file systems tell of a full disk when a file is closed
                os.replace(aside, path)
            except BaseException:
                os.remove(aside)
                raise


def write_aside(path, data):
    """Writes bytes so that a file under `path` is always whole."""
    with writing(path) as f:
        f.write(data)


def append(path, data):
    """Adds bytes to a file. Where they do not all fit it stays as it was."""
    check_file(path)
    with naming(path), open(path, "ab", buffering=0) as f:
        size = f.tell()
        try:
            while data:
                data = data[f.write(data):]
        except OSError:
            f.truncate(size)
            raise


def _open_alone(path):
    """The file `path`, made where it is not there, under a lock that ends with the process; None where another process
    has it. Where the file system has no locks nothing is locked."""
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
        f.close()  # its holder renamed or removed it just now
    return None


@contextlib.contextmanager
def hold(folder, flag):
    """Holds the folder against any other command that writes there, to the end of the block or of this process, however it
    comes. Of several hosts the first holds it for all. Raises UserError naming who holds it."""
    import jax

    if jax.process_index():
        yield
        return
    path = os.path.join(folder, LOCK)
    with naming(path):
        for _ in range(20):  # its holder may be about to say who it is, or to let go
            f = _open_alone(path)
            holder = None if f else _holder(path)
            if f or holder:
                break
            time.sleep(0.05)
        if f is None:
            raise UserError(f"--{flag}={folder}: {holder or 'another process'} is writing there: wait for its end, or name "
                            "another folder")
        f.truncate()
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        f.write(json.dumps({"host": platform.node(), "process": os.getpid(), "since": now}).encode())
        f.flush()
    reach = _reach_of_locks(f, folder)
    if reach:
        print(f"{folder}: {reach}: see to it that no other host runs a command that writes there", flush=True)

    def release():
        with contextlib.suppress(OSError):  # the folder may be gone
            os.remove(path)
        f.close()

    ending.at_end.append(release)
    try:
        yield
    finally:
        ending.at_end.remove(release)
        release()


def _holder(path):
    try:
        with open(path, "rb") as f:
            there = json.load(f)
        return f"process {there['process']} on host {there['host']} (since {there['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reach_of_locks(f, folder):
    """What is to be said of locks that do not keep other hosts away, or None."""
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
