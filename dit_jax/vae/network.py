"""Stable Diffusion's autoencoder (AutoencoderKL): pictures <-> latents of an eighth of their size.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, section 3.1. Modules are named as in the
published files, so that a parameter's path is its published name (see dit_jax/autoencoder.py). Shapes below: B batch,
H, W the map's height and width, C channels. Convolutions and matrix products run in `dtype`; parameters, GroupNorm and
the softmax are float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

# What the published ft-EMA and ft-MSE are: 248 arrays, 83,653,863 parameters.
PUBLISHED = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32,
                 in_channels=3)


def precision(dtype):
    """A TPU multiplies float32 in one pass of bfloat16 unless asked for more."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class GroupNorm(nnx.Module):
    """float32 statistics in two passes; channels first, then groups, as a TPU pads a last axis of C / groups."""

    def __init__(self, channels, groups):
        self.groups = groups
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        """x (B, H, W, C) -> the same, float32."""
        x = x.astype(jnp.float32)
        x = x - self._mean(x)
        return x * (jax.lax.rsqrt(self._mean(jnp.square(x)) + 1e-6) * self.scale[...]) + self.bias[...]

    def _mean(self, x):
        groups = x.mean((1, 2)).reshape(len(x), self.groups, -1)
        return jnp.repeat(groups.mean(-1), groups.shape[-1], axis=1)[:, None, None]


def conv(inputs, outputs, size, dtype, rngs, **kwargs):
    return nnx.Conv(inputs, outputs, (size, size), dtype=dtype, precision=precision(dtype), rngs=rngs, **kwargs)


class Resnet(nnx.Module):
    def __init__(self, inputs, outputs, groups, dtype, rngs):
        self.norm1, self.conv1 = GroupNorm(inputs, groups), conv(inputs, outputs, 3, dtype, rngs)
        self.norm2, self.conv2 = GroupNorm(outputs, groups), conv(outputs, outputs, 3, dtype, rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, dtype, rngs)

    def __call__(self, x):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class Attention(nnx.Module):
    """One head over all positions."""

    def __init__(self, channels, groups, dtype, rngs):
        self.dtype = dtype
        self.group_norm = GroupNorm(channels, groups)
        linear = lambda: nnx.Linear(channels, channels, dtype=dtype, precision=precision(dtype), rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), nnx.List([linear()])

    def __call__(self, x):
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)  # (B, HW, C), as q, k and v
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        how = dict(precision=precision(self.dtype), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k, **how) * c**-0.5)  # (B, HW, HW)
        out = jnp.einsum("bqk,bkc->bqc", weights.astype(self.dtype), v, **how)
        return x + self.to_out[0](out).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels, groups, dtype, rngs):
        self.resnets = nnx.List([Resnet(channels, channels, groups, dtype, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, dtype, rngs)])

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """Resnets at one size, then a halving (`down`: padded below and to the right) or a doubling (`up`), or neither."""

    def __init__(self, inputs, outputs, layers, groups, dtype, rngs, down=False, up=False):
        self.resnets = nnx.List([Resnet(outputs if i else inputs, outputs, groups, dtype, rngs) for i in range(layers)])
        how = dict(strides=2, padding=((0, 1), (0, 1))) if down else {}
        if down or up:
            sampler = nnx.List([nnx.Dict(conv=conv(outputs, outputs, 3, dtype, rngs, **how))])
            setattr(self, "downsamplers" if down else "upsamplers", sampler)

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0]["conv"](x)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0]["conv"](jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


class Encoder(nnx.Module):
    def __init__(self, in_channels, channels, layers, groups, out_channels, dtype, rngs):
        self.conv_in = conv(in_channels, channels[0], 3, dtype, rngs)
        self.down_blocks = nnx.List([Level(channels[max(i - 1, 0)], c, layers, groups, dtype, rngs,
                                           down=i < len(channels) - 1) for i, c in enumerate(channels)])
        self.mid_block = MidBlock(channels[-1], groups, dtype, rngs)
        self.conv_norm_out = GroupNorm(channels[-1], groups)
        self.conv_out = conv(channels[-1], out_channels, 3, dtype, rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, latent_channels, channels, layers, groups, out_channels, dtype, rngs):
        channels = channels[::-1]
        self.conv_in = conv(latent_channels, channels[0], 3, dtype, rngs)
        self.mid_block = MidBlock(channels[0], groups, dtype, rngs)
        self.up_blocks = nnx.List([Level(channels[max(i - 1, 0)], c, layers + 1, groups, dtype, rngs,
                                         up=i < len(channels) - 1) for i, c in enumerate(channels)])
        self.conv_norm_out = GroupNorm(channels[-1], groups)
        self.conv_out = conv(channels[-1], out_channels, 3, dtype, rngs)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Args: block_out_channels: the width at each size, from the pictures' down. layers_per_block: resnets at each size
    of the encoder; the decoder has one more. dtype: of products and activations.
    Raises: ValueError where the groups do not divide a width."""

    def __init__(self, *, block_out_channels, layers_per_block, latent_channels, norm_num_groups, in_channels=3,
                 dtype=jnp.float32, rngs):
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(f"norm_num_groups={norm_num_groups} does not divide each of {block_out_channels=}")
        shape, c = (tuple(block_out_channels), layers_per_block, norm_num_groups), latent_channels
        self.encoder = Encoder(in_channels, *shape, 2 * c, dtype, rngs)
        self.quant_conv = conv(2 * c, 2 * c, 1, dtype, rngs)
        self.post_quant_conv = conv(c, c, 1, dtype, rngs)
        self.decoder = Decoder(c, *shape, in_channels, dtype, rngs)

    def encode(self, x):
        """x (B, H, W, 3) in [-1, 1] -> mean and log variance of the posterior, (B, H/8, W/8, C) float32 each."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, z):
        """z (B, h, w, C), not scaled -> (B, 8h, 8w, 3) float32, in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)


@functools.lru_cache
def abstract(**args):
    """(graphdef, params) of VAE(**args) with shapes in place of arrays: nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VAE(**args, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
