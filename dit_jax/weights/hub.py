"""Fetches published files, once: from the Hugging Face hub, and the authors' own .pt files."""

import contextlib
import glob
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from dit_jax.runtime.errors import UserError, first_line
from dit_jax.runtime.files import open_locked
from dit_jax.runtime.process import cache_folder, quiet_hub
from dit_jax.runtime.progress import say, waiting

AUTHORS = "https://dl.fbaipublicfiles.com/DiT/models/"


def fetch(
    repository: str, patterns: list[str], revision: str | None = None, needed: Sequence[str] | None = None
) -> str:
    """Fetches the files of a repository on the hub that match `patterns`. Returns their folder, in the hub's own cache.

    revision: a commit; None for the newest. needed: without a network, a cached folder is used only if it has a file
    for each of these patterns; None for `patterns`. Raises UserError.
    """
    from huggingface_hub import HfApi, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or None

    def download(local=False):
        return snapshot_download(
            repository, revision=revision, allow_patterns=patterns, endpoint=endpoint, local_files_only=local
        )

    def attempt():
        try:  # snapshot_download retries for half a minute where there is no network
            HfApi(endpoint=endpoint).model_info(repository, revision=revision)
        except Exception as e:
            with contextlib.suppress(Exception):
                folder = download(local=True)
                inside = os.path.join(glob.escape(folder), "")
                if all(any(map(os.path.isfile, glob.glob(inside + name))) for name in needed or patterns):
                    return folder
            raise e from None
        return download()

    place = f"https://huggingface.co/{repository}/tree/{revision or 'main'}"
    what = ", ".join(patterns) if len(patterns) == 1 else "the files"
    folder = _download_or_explain(repository, f"{what} of {place} and name their folder", attempt)
    for parent, _, names in os.walk(folder):
        for name in names:
            _check_digest(os.path.join(parent, name))
    return folder


def fetch_authors(file: str) -> str:
    """Fetches one of the authors' files into ~/.cache/dit_jax/weights. Returns its path. Raises UserError.

    No hash of these files is published. They are zip files, so the checksum of every array is compared when it is read;
    a damaged file must be removed by hand.
    """
    path = os.path.join(cache_folder(), "weights", file)
    if not os.path.isfile(path):
        url = AUTHORS + file
        _download_or_explain(file, f"{url} and put it at {path}", lambda: _download(url, path))
    return path


def fetched_by_hand(name: str, file: str, page: str) -> str:
    """The path of a file in ~/.cache/dit_jax/weights that has no address to fetch it from.

    page: where its authors link to it. Raises UserError if it is not there.
    """
    path = os.path.join(cache_folder(), "weights", file)
    if not os.path.isfile(path):
        raise UserError(
            f"{name}: has no lasting address: fetch {file} by the link in {page}, and name it with --weights=FILE "
            f"--objective=flow, or put it at {path}"
        )
    return path


def _download(url: str, path: str) -> str:
    """Downloads to PATH.part and renames it when it is complete. A second call resumes.

    While another process downloads it, this one waits.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part, waits = f"{path}.part", False
    while not os.path.isfile(path):
        f = open_locked(part)
        if f is None:
            if not waits:
                say(f"{path}: another process is fetching it; waiting for it")
            waits = True
            time.sleep(0.5)
            continue
        with f:
            try:
                if not os.path.isfile(path):
                    _download_rest(url, f, os.path.basename(path))
                    f.flush()
            finally:
                if not f.tell():
                    os.remove(part)
            if not os.path.isfile(path):
                os.replace(part, path)
    return path


def _download_rest(url: str, f: BinaryIO, name: str) -> None:
    """Downloads what follows the bytes that `f` has. name: for the progress bar."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    try:
        http_get(url, f, resume_size=f.seek(0, os.SEEK_END), displayed_filename=name)
    except HfHubHTTPError as e:
        if e.response.status_code != 416:  # there is nothing after these bytes
            raise
        if e.response.headers.get("Content-Range") != f"bytes */{f.tell()}":
            f.seek(0)
            f.truncate()
            http_get(url, f, displayed_filename=name)


def _download_or_explain(name: str, remedy: str, download: Callable[[], str]) -> str:
    """The path that download() returns; its errors become one UserError. remedy: what to fetch by hand."""
    try:
        # Its bars move on a terminal.
        with quiet_hub(), waiting("" if sys.stderr.isatty() else f"fetching {name}"):
            return download()
    except Exception as e:  # huggingface_hub raises its own errors, httpx's and the system's
        raise UserError(
            f"{name}: cannot be fetched ({first_line(e)}): run again to resume, or where there is a network fetch "
            f"{remedy}"
        ) from None


def _check_digest(path: str) -> None:
    """Raises UserError if a file of the hub's cache is damaged. The hub names large files by their sha256."""
    blob = os.path.realpath(path)
    if not re.fullmatch(r"[0-9a-f]{64}", os.path.basename(blob)):
        return
    with open(blob, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != os.path.basename(blob):
        os.remove(blob)
        raise UserError(f"{path}: is damaged (its sha256 is {digest}) and was removed: run again to fetch it")
