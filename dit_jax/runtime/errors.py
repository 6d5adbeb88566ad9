"""Errors that the user can fix, and the one line in which a command reports any error."""

import contextlib
import errno
import os
import tempfile
import traceback

ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EACCES: "change the permissions",
    errno.EPERM: "change the permissions",
    errno.EROFS: "name a folder that can be written",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOENT: "put back what was removed",
    errno.ENOTDIR: "a file stands in a folder's place: move it away",
    errno.EISDIR: "move the folder away",
}


class UserError(ValueError):
    """Bad input. The text is one line that names the file, field or flag, and says what is wrong and what to do."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """Returns the first line of an exception's text that is not blank, or the name of its type, cut to `limit`."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:limit]


def chain(error: BaseException | None) -> list[BaseException]:
    """Returns an exception and those that caused it, the latest first."""
    errors = []
    while error is not None:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def os_problem(error: OSError) -> str:
    """Returns the line that reports an OSError: the path, the reason, what to do."""
    path = "the output" if error.filename is None else os.fsdecode(error.filename)
    reason, advice = error.strerror or error, ADVICE.get(error.errno or 0, "look at this path")
    return f"{path}: {reason}: {advice}; complete files are kept; run the same command again to resume"


def line_of(error: BaseException) -> str:
    """Returns the line that reports any exception: what is wrong, and what to do.

    An exception of no known kind is a defect of this package. Its traceback goes to a temporary file that the line
    names.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more; run the same command again to resume"
    if isinstance(error, OSError):
        return os_problem(error)
    first = first_line(error, 300) if str(error).strip() else ""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first:
        return f"out of memory ({first or type(error).__name__}): a smaller batch or model needs less"
    where = "its traceback, for which there is no room"
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile("w", prefix="dit_jax-", suffix=".txt", delete=False) as f,
    ):
        f.writelines(traceback.format_exception(error))
        where = f.name
    return f"{type(error).__name__}: {first} (a defect of dit_jax: please report it with {where})"
