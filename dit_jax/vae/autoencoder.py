"""Stable Diffusion's VAE with its weights, ready to encode and decode.

vae = files.load("stabilityai/sd-vae-ft-ema")       # dit_jax/vae/files.py
mean, std = vae.encode(vae.params, images)          # may be jitted
images = vae.decode(vae.params, latents)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from dit_jax.parallel import sharding
from dit_jax.runtime.overlap import in_flight
from dit_jax.vae import network

SCALE = 0.18215
ENCODING, DECODING = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")  # the weights that each needs

Latents = Float[np.ndarray, "n h w c"] | Float[Array, "n h w c"]
Images = UInt8[Array, "b H W 3"] | Float[Array, "b H W 3"]


class Autoencoder:
    """A VAE with its weights.

    Args and attributes:
        args: arguments of vae.network.VAE.
        params: nested dict of float32 arrays.
        scale: the DiT's latents are the VAE's latents times `scale`.
        identity: {"name", "sha256" of the file, "scale", "encoder", "decoder"}. The last two are digests of the arrays,
            the same for the same arrays in any file format.
        dtype: of products and activations.

    Further attributes: factor, how many times smaller than a picture a latent is on each side; latent_channels.
    """

    def __init__(
        self,
        args: dict[str, Any],
        params: Any,
        scale: float = SCALE,
        identity: dict[str, Any] | None = None,
        dtype: str = "float32",
    ):
        self.args, self.params, self.scale, self.identity = args, params, scale, identity or {}
        self.factor, self.latent_channels = 2 ** (len(args["block_out_channels"]) - 1), args["latent_channels"]
        self.graphdef, self.shapes = network.abstract(**args, dtype=jnp.dtype(dtype))

    def only(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the weights that encode (names=ENCODING) or decode (names=DECODING) needs."""
        return {name: self.params[name] for name in names}

    def encode(self, params: Any, images: Images) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Returns (mean, standard deviation) of the posteriors, not scaled, float32. A pure function.

        images: uint8, or float32 in [-1, 1].
        """
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1
        mean, logvar = nnx.merge(self.graphdef, self.shapes | params).encode(images)
        return mean, jnp.exp(0.5 * logvar)

    def decode(self, params: Any, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Returns images in about [-1, 1], not clipped, float32, of scaled latents. A pure function."""
        return nnx.merge(self.graphdef, self.shapes | params).decode(latents.astype(jnp.float32) / self.scale)

    def posteriors(self, params: Any, images: Images) -> Float[Array, "b 2 h w 2*c"]:
        """Returns [mean, standard deviation] of each picture and of its mirror image, float32. A pure function.

        images: as in encode. The two passes run one after the other, so that they need the memory of one.
        """
        both = jnp.stack([images, images[:, :, ::-1]])
        return jax.lax.map(lambda x: jnp.concatenate(self.encode(params, x), axis=-1), both).swapaxes(0, 1)

    def decoder(self, mesh: Mesh | None, size: int) -> "Decoder":
        """Returns the Decoder of latents of pictures of size x size. mesh: None for one device."""
        return Decoder(self, sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh, size)


class Decoder:
    """decoder(latents) -> images (n, size, size, 3) float32 of scaled latents (n, h, w, c), both NumPy arrays.

    It decodes batch_size(size) latents at a time on each device of the mesh, by the same program for any number of
    devices. On several hosts all call it with the same latents.
    """

    def __init__(self, vae: Autoencoder, mesh: Mesh, size: int):
        self.run, self.at_once = sharding.over_devices(vae.decode, mesh), mesh.size * batch_size(size)
        self.split, whole = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), sharding.replicated(mesh)
        self.params = jax.tree.map(lambda a: sharding.put(a, whole), vae.only(DECODING))

    def __call__(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n H W 3"]:
        return np.concatenate([np.asarray(part) for part in in_flight(self.parts(latents), 1)])[: len(latents)]

    def parts(self, latents: Latents) -> Iterator[Float[Array, "m H W 3"]]:
        """Yields the images in parts, as soon as the devices have begun with them. The last part is filled up.

        latents: NumPy arrays, or jax.Arrays that are whole on each device, which may be on their way.
        """
        of_jax = jnp.pad, jnp.split, jax.device_put
        pad, split, put = of_jax if isinstance(latents, jax.Array) else (np.pad, np.split, sharding.put)
        latents = pad(latents.astype(np.float32), [(0, -len(latents) % self.at_once), *[(0, 0)] * 3])
        for part in split(latents, len(latents) // self.at_once):
            yield self.run(self.params, put(part, self.split))  # pyright: ignore[reportArgumentType]


def batch_size(size: int) -> int:
    """Returns how many pictures of size x size the VAE processes at once on a device: 4 up to 256, 1 from 512 on."""
    return max(1, min(4, (512 // size) ** 2))
