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

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dit_jax.runtime.errors import UserError

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")
MLP_RATIO = 4


class NoSharding:
    """The default of `sharding`: arrays stay where they are. parallel.sharding.MeshSharding lays them out on a mesh."""

    def constrain(self, x, *axes):
        """An activation x, each dimension named by what it counts (parallel.sharding.AXES) or None -> x."""
        return x

    def gather_weights(self, params, dtype):
        """One block's parameters -> the same, ready for its matrix products in dtype."""
        return params


NO_SHARDING = NoSharding()
xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()


def layer_norm(dim, *, affine, dtype, rngs):
    # The one-pass variance E[x^2] - E[x]^2 loses digits that the published weights depend on.
    return nnx.LayerNorm(dim, epsilon=1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False,
                         dtype=dtype, rngs=rngs)


def modulate(x, shift, scale):
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def attention(q, k, v):
    """Softmax attention: q (B, H, N, K), k and v (B, H, M, K) -> (B, H, N, K)."""
    scores = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    # Named for remat "dots", which would make it again: its products have batch dimensions.
    return checkpoint_name(jnp.einsum("bhnm,bhmk->bhnk", weights, v), "attention")


@jax.custom_vjp
def gelu(x):
    """GELU, its tanh approximation. The backward pass keeps x alone: of what JAX would keep beside it, XLA on CPU makes
    several passes through memory."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_backward(x, g):
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = jnp.tanh(c * (x + a * x**3))
    return (g * (0.5 * (1 + t) + 0.5 * c * x * (1 - t * t) * (1 + 3 * a * x * x)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def product(x, kernel):
    """x (..., I) times kernel (I, O)."""
    return x @ kernel


def _product_backward(kept, g):
    x, kernel = kept

    def of_rows(x, g):  # of more dimensions, XLA on CPU makes transposed copies, and multiplies these slower; a TPU does not
        return x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])

    def of_all(x, g):
        return jnp.tensordot(g, x, 2 * [tuple(range(x.ndim - 1))]).T

    return g @ kernel.T, jax.lax.platform_dependent(x, g, cpu=of_rows, default=of_all)


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)  # @, which remat "dots" is to see
Linear = partial(nnx.Linear, dot_general=lambda x, kernel, *_, **__: product(x, kernel))


class SelfAttention(nnx.Module):
    def __init__(self, dim, num_heads, *, dtype, sharding, rngs):
        self.num_heads, self.sharding = num_heads, sharding
        # Columns of qkv: head by head, q, k and v of each, so that a tensor-parallel mesh can split the heads.
        self.qkv = Linear(dim, 3 * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        qkv = rearrange(self.qkv(x), "b n (h three k) -> b n h three k", h=self.num_heads, three=3)
        qkv = self.sharding.constrain(qkv, "batch", None, "heads", None, None)
        # Split, not indexed: the gradient is one concatenation then, and not the sum of three padded arrays.
        x = attention(*(rearrange(a, "b n h 1 k -> b h n k") for a in jnp.split(qkv, 3, axis=3)))
        x = self.sharding.constrain(rearrange(x, "b h n k -> b n h k"), "batch", None, "heads", None)
        return self.proj(rearrange(x, "b n h k -> b n (h k)"))


class CrossAttention(nnx.Module):
    def __init__(self, dim, num_heads, *, dtype, sharding, rngs):
        self.num_heads, self.sharding = num_heads, sharding
        self.q = Linear(dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.kv = Linear(dim, 2 * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)  # columns as in SelfAttention
        self.proj = Linear(dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x, context):
        q = rearrange(self.q(x), "b n (h k) -> b n h k", h=self.num_heads)
        kv = rearrange(self.kv(context), "b n (h two k) -> b n h two k", h=self.num_heads, two=2)
        q, kv = self.sharding.constrain(q, "batch", None, "heads", None), self.sharding.constrain(kv, "batch", None, "heads", None, None)
        k, v = (rearrange(a, "b n h 1 k -> b h n k") for a in jnp.split(kv, 2, axis=3))
        x = rearrange(attention(rearrange(q, "b n h k -> b h n k"), k, v), "b h n k -> b n h k")
        return self.proj(rearrange(self.sharding.constrain(x, "batch", None, "heads", None), "b n h k -> b n (h k)"))


class Mlp(nnx.Module):
    def __init__(self, dim, *, dtype, sharding, rngs):
        self.sharding = sharding
        self.fc1 = Linear(dim, MLP_RATIO * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(MLP_RATIO * dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = gelu(self.sharding.constrain(self.fc1(x), "batch", None, "units"))
        return self.fc2(self.sharding.constrain(x, "batch", None, "units"))


class AdaLNBlock(nnx.Module):
    """adaLN-Zero (`gated`) and adaLN. The regression starts at zero in both: a gated block is then the
    identity, an ungated one a transformer block with plain LayerNorm."""

    def __init__(self, dim, num_heads, *, gated, dtype, sharding, rngs):
        self.gated, self.sharding = gated, sharding
        self.norm1 = layer_norm(dim, affine=False, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, dtype=dtype, sharding=sharding, rngs=rngs)
        self.norm2 = layer_norm(dim, affine=False, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, sharding=sharding, rngs=rngs)
        self.adaLN_modulation = Linear(dim, (6 if gated else 4) * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, c):
        """x (B, N, D), c (B, D)."""
        c = self.sharding.constrain(self.adaLN_modulation(self.sharding.constrain(jax.nn.silu(c), "replica", "width")), "batch", "units")
        parts = jnp.split(self.sharding.constrain(c, "batch", None), 6 if self.gated else 4, axis=-1)
        if self.gated:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
        else:
            shift1, scale1, shift2, scale2 = parts
        h = self.shard_tokens(self.attn(self.gather_tokens(modulate(self.norm1(x), shift1, scale1))))
        x = x + (gate1[:, None] * h if self.gated else h)
        h = self.shard_tokens(self.mlp(self.gather_tokens(modulate(self.norm2(x), shift2, scale2))))
        return x + (gate2[:, None] * h if self.gated else h)

    def shard_tokens(self, x):
        return self.sharding.constrain(x, "batch", "tokens", None)

    def gather_tokens(self, x):
        return self.sharding.constrain(self.shard_tokens(x), "batch", None, None)


class ViTBlock(nnx.Module):
    """A plain ViT block, and with `cross` the cross-attention design: a further attention, to the condition
    tokens, between self-attention and MLP."""

    def __init__(self, dim, num_heads, *, cross, dtype, sharding, rngs):
        self.sharding = sharding
        self.norm1 = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, dtype=dtype, sharding=sharding, rngs=rngs)
        self.norm2 = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, sharding=sharding, rngs=rngs)
        self.cross = cross
        if cross:
            self.norm_cross = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
            self.cross_attn = CrossAttention(dim, num_heads, dtype=dtype, sharding=sharding, rngs=rngs)

    def __call__(self, x, tokens):
        """x (B, N, D), tokens (B, 2, D): the timestep's and the label's embedding."""
        whole, split = ("batch", None, None), ("batch", "tokens", None)
        x = x + self.sharding.constrain(self.attn(self.sharding.constrain(self.norm1(x), *whole)), *split)
        if self.cross:
            x = x + self.sharding.constrain(self.cross_attn(self.sharding.constrain(self.norm_cross(x), *whole), tokens), *split)
        return x + self.sharding.constrain(self.mlp(self.sharding.constrain(self.norm2(x), *whole)), *split)


def make_block(name, dim, num_heads, *, dtype, rngs, sharding=NO_SHARDING):
    """One block of the design `name` (see BLOCKS)."""
    if name in ("adaln_zero", "adaln"):
        return AdaLNBlock(dim, num_heads, gated=name == "adaln_zero", dtype=dtype, sharding=sharding, rngs=rngs)
    if name in ("cross_attention", "in_context"):
        return ViTBlock(dim, num_heads, cross=name == "cross_attention", dtype=dtype, sharding=sharding, rngs=rngs)
    raise UserError(f"unknown block design {name!r}: one of {', '.join(BLOCKS)}")
