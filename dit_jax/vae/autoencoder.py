"""Stable Diffusion's VAE with its weights, as calls.

    vae = files.load("stabilityai/sd-vae-ft-ema")       # dit_jax/vae/files.py
    mean, std = vae.encode(vae.params, images)          # fit for jax.jit
    images = vae.decode(vae.params, latents)
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from dit_jax.parallel import sharding
from dit_jax.vae import network

SCALE = 0.18215
ENCODING, DECODING = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")  # the weights that each takes


class Autoencoder:
    """A VAE with its weights.

    args: of vae.network.VAE. params: nested dict of float32 arrays. scale: the DiT's latents are the VAE's times it.
    factor: pixels a latent pixel, a side. latent_channels. identity: dict(name, sha256 of the file, scale, and of the
    encoder's and the decoder's arrays 16 hexadecimal digits each, the same for the same arrays in any format).
    """

    def __init__(self, args, params, scale=SCALE, identity=None, dtype="float32"):
        self.args, self.params, self.scale, self.identity = args, params, scale, identity
        self.factor, self.latent_channels = 2 ** (len(args["block_out_channels"]) - 1), args["latent_channels"]
        self.graphdef, self.shapes = network.abstract(**args, dtype=jnp.dtype(dtype))

    def only(self, names):
        """The weights of these names, ENCODING or DECODING: all that encode or decode needs."""
        return {name: self.params[name] for name in names}

    def encode(self, params, images):
        """images (B, S, S, 3), uint8 or float32 in [-1, 1] -> mean and standard deviation of the posterior,
        (B, s, s, C) float32 each, not scaled. A pure function."""
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1
        mean, logvar = nnx.merge(self.graphdef, self.shapes | params).encode(images)
        return mean, jnp.exp(0.5 * logvar)

    def decode(self, params, latents):
        """latents (B, s, s, C), scaled, as the DiT makes them -> images (B, S, S, 3) float32, not clipped. Pure."""
        return nnx.merge(self.graphdef, self.shapes | params).decode(latents.astype(jnp.float32) / self.scale)

    def posteriors(self, params, images):
        """images as of encode -> (B, 2, s, s, 2C) float32: of each picture and its mirror image [mean, standard
        deviation]. A pure function. The two passes follow each other, so as to need the memory of one."""
        return jax.lax.map(lambda x: jnp.concatenate(self.encode(params, x), axis=-1),
                           jnp.stack([images, images[:, :, ::-1]])).swapaxes(0, 1)

    def decoder(self, mesh, size):
        """-> f(latents (N, s, s, C) scaled, numpy) -> images (N, size, size, 3) float32, numpy. Over all devices of the
        mesh (None: one device), batch_size(size) at a time on each, by one program whatever their number. On several
        hosts all call it with the same latents."""
        mesh = sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        run, n = sharding.over_devices(self.decode, mesh), mesh.size * batch_size(size)
        split, whole = NamedSharding(mesh, P(mesh.axis_names)), sharding.replicated(mesh)
        params = jax.tree.map(lambda a: sharding.put(a, whole), self.only(DECODING))

        def decode(latents):
            images = []
            for start in range(0, len(latents), n):
                part = np.asarray(latents[start: start + n], np.float32)
                part = np.concatenate([part, np.zeros((n - len(part), *part.shape[1:]), np.float32)])
                images.append(np.asarray(run(params, sharding.put(part, split))))
            return np.concatenate(images)[: len(latents)]

        return decode


def batch_size(size):
    """How many pictures of size x size go through the VAE at once on a device: 4 up to 256, 1 from 512 on."""
    return max(1, min(4, (512 // size) ** 2))
