"""Stable Diffusion's autoencoder (AutoencoderKL), from pictures to latents of an eighth of their size and back.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, section 3.1. Modules have the names of the
published files, so that the path of a parameter is its published name (see dit_jax/vae/files.py). Convolutions and
matrix products run in `dtype`; parameters, GroupNorm and softmax are float32.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# The size of the published ft-EMA and ft-MSE: 248 arrays, 83,653,863 parameters.
PUBLISHED: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32, in_channels=3
)


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Returns HIGHEST for float32: otherwise a TPU multiplies float32 in one pass of bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class GroupNorm(nnx.Module):
    """Group normalisation in float32, its variance computed in a second pass.

    Means are taken over each channel, then over its group: an array whose last axis is C / groups would be padded on a
    TPU.
    """

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x.astype(jnp.float32)
        x = x - self._mean(x)
        return x * (jax.lax.rsqrt(self._mean(jnp.square(x)) + 1e-6) * self.scale[...]) + self.bias[...]

    def _mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        groups = x.mean((1, 2)).reshape(len(x), self.groups, -1)
        return jnp.repeat(groups.mean(-1), groups.shape[-1], axis=1)[:, None, None]


def conv(inputs: int, outputs: int, size: int, dtype: DTypeLike, rngs: nnx.Rngs, **kwargs: Any) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (size, size), dtype=dtype, precision=precision(dtype), rngs=rngs, **kwargs)


class Resnet(nnx.Module):
    """Residual block of two 3 x 3 convolutions; a 1 x 1 convolution on the shortcut if the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1, self.conv1 = GroupNorm(inputs, groups), conv(inputs, outputs, 3, dtype, rngs)
        self.norm2, self.conv2 = GroupNorm(outputs, groups), conv(outputs, outputs, 3, dtype, rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c_out"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nnx.Module):
    """Residual self-attention of one head over all positions."""

    def __init__(self, channels: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.group_norm = GroupNorm(channels, groups)
        linear = lambda: nnx.Linear(channels, channels, dtype=dtype, precision=precision(dtype), rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), nnx.List([linear()])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)  # (b, hw, c)
        einsum = functools.partial(jnp.einsum, precision=precision(self.dtype), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(einsum("bqc,bkc->bqk", q, k) * c**-0.5)  # (b, hw, hw)
        out = einsum("bqk,bkc->bqc", weights.astype(self.dtype), v)
        return x + self.to_out[0](out).reshape(x.shape)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet, at the smallest size."""

    def __init__(self, channels: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.resnets = nnx.List([Resnet(channels, channels, groups, dtype, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, dtype, rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """Resnets at one size, then with `down` a halving (padded at the bottom and right), with `up` a doubling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        down: bool = False,
        up: bool = False,
    ):
        self.resnets = nnx.List([Resnet(outputs if i else inputs, outputs, groups, dtype, rngs) for i in range(layers)])
        if down:
            halving = conv(outputs, outputs, 3, dtype, rngs, strides=2, padding=((0, 1), (0, 1)))
            self.downsamplers = nnx.List([nnx.Dict(conv=halving)])
        if up:
            self.upsamplers = nnx.List([nnx.Dict(conv=conv(outputs, outputs, 3, dtype, rngs))])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0]["conv"](x)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0]["conv"](jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


class Encoder(nnx.Module):
    """Pictures to the parameters of their posteriors: a level for each width of `channels`, then the middle block."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        layers: int,
        groups: int,
        out_channels: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv_in = conv(in_channels, channels[0], 3, dtype, rngs)
        self.down_blocks = nnx.List()
        for i, width in enumerate(channels):
            down = i < len(channels) - 1
            self.down_blocks.append(Level(channels[max(i - 1, 0)], width, layers, groups, dtype, rngs, down=down))
        self.mid_block = MidBlock(channels[-1], groups, dtype, rngs)
        self.conv_norm_out = GroupNorm(channels[-1], groups)
        self.conv_out = conv(channels[-1], out_channels, 3, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to pictures: the middle block, then the encoder's levels in reverse, each with one more resnet."""

    def __init__(
        self,
        latent_channels: int,
        channels: Sequence[int],
        layers: int,
        groups: int,
        out_channels: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        channels = channels[::-1]
        self.conv_in = conv(latent_channels, channels[0], 3, dtype, rngs)
        self.mid_block = MidBlock(channels[0], groups, dtype, rngs)
        self.up_blocks = nnx.List()
        for i, width in enumerate(channels):
            up = i < len(channels) - 1
            self.up_blocks.append(Level(channels[max(i - 1, 0)], width, layers + 1, groups, dtype, rngs, up=up))
        self.conv_norm_out = GroupNorm(channels[-1], groups)
        self.conv_out = conv(channels[-1], out_channels, 3, dtype, rngs)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h_out w_out c_out"]:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """The autoencoder. Latents are not scaled here.

    Args:
        block_out_channels: the width at each size, from the pictures' size down.
        layers_per_block: resnets at each size of the encoder; the decoder has one more.
        latent_channels: channels of a latent.
        norm_num_groups: groups of every GroupNorm. Raises ValueError if they do not divide a width.
        in_channels: channels of a picture.
        dtype: of products and activations.
    """

    def __init__(
        self,
        *,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(f"norm_num_groups={norm_num_groups} does not divide each of {block_out_channels=}")
        shape, c = (tuple(block_out_channels), layers_per_block, norm_num_groups), latent_channels
        self.encoder = Encoder(in_channels, *shape, 2 * c, dtype, rngs)
        self.quant_conv = conv(2 * c, 2 * c, 1, dtype, rngs)
        self.post_quant_conv = conv(c, c, 1, dtype, rngs)
        self.decoder = Decoder(c, *shape, in_channels, dtype, rngs)

    def encode(self, x: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Returns (mean, log variance) of the posteriors of pictures in [-1, 1], float32."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Returns pictures in about [-1, 1], not clipped, float32."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)


@functools.lru_cache
def abstract(**args: Any) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, params) of VAE(**args) with shapes in place of arrays; allocates nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VAE(**args, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
