"""The paper's four block designs (section 3.2, figure 3), each a map (B, N, D) -> (B, N, D).

| name             | how the condition enters                                                   |
|------------------|----------------------------------------------------------------------------|
| adaln_zero       | shift, scale and a gate before each residual, regressed from c; all start 0 |
| adaln            | shift and scale regressed from c, no gate                                  |
| cross_attention  | the two condition tokens are keys and values of a further attention        |
| in_context       | the two condition tokens stand in the sequence: a plain ViT block          |

Shapes below: B batch, N tokens, D width, H heads, K = D / H. Matrix products run in `dtype`; parameters,
LayerNorm statistics and the softmax are float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")
MLP_RATIO = 4

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()


def layer_norm(dim, *, affine, dtype, rngs):
    # The one-pass variance E[x^2] - E[x]^2 loses digits that the published weights depend on.
    return nnx.LayerNorm(dim, epsilon=1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False,
                         dtype=dtype, rngs=rngs)


def modulate(x, shift, scale):
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SelfAttention(nnx.Module):
    def __init__(self, dim, num_heads, *, dtype, rngs):
        # Heads are an axis of their own in the kernels, so that a tensor-parallel mesh can split them.
        linear = partial(nnx.LinearGeneral, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.qkv = linear(dim, (3, num_heads, dim // num_heads))
        self.proj = linear((num_heads, dim // num_heads), dim, axis=(-2, -1))

    def __call__(self, x):
        qkv = self.qkv(x)  # (B, N, 3, H, K)
        x = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])  # (B, N, H, K)
        return self.proj(x)


class CrossAttention(nnx.Module):
    def __init__(self, dim, num_heads, *, dtype, rngs):
        linear = partial(nnx.LinearGeneral, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.q = linear(dim, (num_heads, dim // num_heads))
        self.kv = linear(dim, (2, num_heads, dim // num_heads))
        self.proj = linear((num_heads, dim // num_heads), dim, axis=(-2, -1))

    def __call__(self, x, context):
        kv = self.kv(context)  # (B, 2, 2, H, K)
        x = jax.nn.dot_product_attention(self.q(x), kv[:, :, 0], kv[:, :, 1])  # (B, N, H, K)
        return self.proj(x)


class Mlp(nnx.Module):
    def __init__(self, dim, *, dtype, rngs):
        self.fc1 = nnx.Linear(dim, MLP_RATIO * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(MLP_RATIO * dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class AdaLNBlock(nnx.Module):
    """adaLN-Zero (`gated`) and adaLN. The regression starts at zero in both: a gated block is then the
    identity, an ungated one a transformer block with plain LayerNorm."""

    def __init__(self, dim, num_heads, *, gated, dtype, rngs):
        self.gated = gated
        self.norm1 = layer_norm(dim, affine=False, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, affine=False, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, rngs=rngs)
        self.adaLN_modulation = nnx.Linear(dim, (6 if gated else 4) * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, c):
        """x (B, N, D), c (B, D)."""
        parts = jnp.split(self.adaLN_modulation(jax.nn.silu(c)), 6 if self.gated else 4, axis=-1)
        if self.gated:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
            x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
            return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        shift1, scale1, shift2, scale2 = parts
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class ViTBlock(nnx.Module):
    """A plain ViT block, and with `cross` the cross-attention design: a further attention, to the condition
    tokens, between self-attention and MLP."""

    def __init__(self, dim, num_heads, *, cross, dtype, rngs):
        self.norm1 = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, rngs=rngs)
        self.cross = cross
        if cross:
            self.norm_cross = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
            self.cross_attn = CrossAttention(dim, num_heads, dtype=dtype, rngs=rngs)

    def __call__(self, x, tokens):
        """x (B, N, D), tokens (B, 2, D): the timestep's and the label's embedding."""
        x = x + self.attn(self.norm1(x))
        if self.cross:
            x = x + self.cross_attn(self.norm_cross(x), tokens)
        return x + self.mlp(self.norm2(x))


def make_block(name, dim, num_heads, *, dtype, rngs):
    """One block of the design `name` (see BLOCKS)."""
    if name in ("adaln_zero", "adaln"):
        return AdaLNBlock(dim, num_heads, gated=name == "adaln_zero", dtype=dtype, rngs=rngs)
    if name in ("cross_attention", "in_context"):
        return ViTBlock(dim, num_heads, cross=name == "cross_attention", dtype=dtype, rngs=rngs)
    raise ValueError(f"unknown block design {name!r}: one of {', '.join(BLOCKS)}")
