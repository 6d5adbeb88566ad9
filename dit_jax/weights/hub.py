"""Published files, fetched once."""

import contextlib
import hashlib
import http.client
import os
import urllib.request
import uuid

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import Progress


def fetch(name, revision, file, sha256):
    """A file of the repository `name` of the Hugging Face hub (or of HF_ENDPOINT) -> its path in ~/.cache/dit_jax, where
    it is kept, whole and with this sha256. Raises UserError."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = os.path.join(home, "dit_jax", "hub", name, revision, file)
    if os.path.isfile(path):
        return path
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}/resolve/{revision}/{file}"
    aside, digest, done, progress = f"{path}.{uuid.uuid4().hex}.part", hashlib.sha256(), 0, None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, open(aside, "wb") as f:
            size = int(response.headers.get("Content-Length", 0))
            progress = Progress(f"fetching {name}", size >> 20, "MiB")
            while block := response.read(2**20):
                f.write(block)
                digest.update(block)
                done += len(block)
                progress.update(done >> 20)
        if done < size:
            raise UserError(f"{url}: the connection broke after {done:,} of {size:,} bytes, nothing was kept: run again")
        if digest.hexdigest() != sha256:
            raise UserError(f"{url}: sha256 is {digest.hexdigest()}, not the published {sha256}: nothing was kept")
        os.replace(aside, path)
    except (OSError, http.client.HTTPException) as e:
        why = getattr(e, "reason", None) or e or type(e).__name__
        raise UserError(f"{url}: cannot be fetched ({why}): fetch it where there is a network, and give the file's path "
                        f"in place of {name}") from None
    finally:
        if progress is not None:
            progress.close()
        with contextlib.suppress(OSError):
            os.remove(aside)
    return path
