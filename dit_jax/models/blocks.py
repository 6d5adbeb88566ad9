"""The paper's four block designs (section 3.2, figure 3). Each maps tokens (B, N, D) to tokens (B, N, D).

| name            | how the condition enters                                                      |
|-----------------|-------------------------------------------------------------------------------|
| adaln_zero      | a shift and a scale after each LayerNorm and a gate before each residual sum, |
|                 | regressed from c = t + y; all start at zero                                   |
| adaln           | the same shifts and scales, without gates                                     |
| cross_attention | a third sublayer attends to the two condition tokens t and y                  |
| in_context      | t and y are two more tokens of the sequence; the block is a plain ViT block   |

Shapes: B batch, N tokens, D width, H heads, K = D / H. Parameters, LayerNorm statistics and the softmax are float32;
matrix products run in `dtype`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dit_jax.models.attention import ATTENTION, attention, pallas_attention, self_attention
from dit_jax.models.derivatives import with_derivative
from dit_jax.runtime.errors import UserError

BLOCKS = ("adaln_zero", "adaln", "cross_attention", "in_context")
MLP_RATIO = 4
xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros_init()


class Sharding(Protocol):
    """Lays out the arrays of a network on its devices. parallel.sharding.MeshSharding does so for a mesh."""

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Returns the activation x. axes: what each dimension counts, a key of parallel.sharding.AXES, or None."""
        ...

    def map_heads(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """Returns function(*arrays), each device computing its examples and heads. Arrays and result: (B, H, ...)."""
        ...

    def gather_weights(self, params: Any, dtype: DTypeLike) -> Any:
        """Returns the parameters of one block, ready for its matrix products in dtype."""
        ...


class NoSharding:
    """The Sharding that leaves arrays where they are."""

    def constrain(self, x: Array, *axes: str | None) -> Array:
        return x

    def map_heads(self, function: Callable[..., Array], *arrays: Array) -> Array:
        return function(*arrays)

    def gather_weights(self, params: Any, dtype: DTypeLike) -> Any:
        return params


NO_SHARDING = NoSharding()


def shard_tokens(x: Float[Array, "b n d"], sharding: Sharding) -> Float[Array, "b n d"]:
    """The layout between sublayers, for norms and residual sums: the `tensor` axis of the mesh splits the tokens."""
    return sharding.constrain(x, "batch", "tokens", None)


def gather_tokens(x: Float[Array, "b n d"], sharding: Sharding) -> Float[Array, "b n d"]:
    """The layout inside a sublayer: every device has all tokens of its examples."""
    return sharding.constrain(x, "batch", None, None)


def layer_norm(dim: int, *, affine: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the width. affine: whether it learns a scale and a shift."""
    # The one-pass variance E[x^2] - E[x]^2 loses digits that the published weights depend on.
    return nnx.LayerNorm(
        dim, epsilon=1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    """Adaptive LayerNorm's affine map (section 3.2), the same for all tokens of an example."""
    return x * (1 + scale[:, None]) + shift[:, None]


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in its tanh approximation (appendix A).

    The derivative is written out so that the backward pass keeps only x. JAX keeps intermediates as well, which cost
    XLA several passes through memory on CPU.
    """
    function = partial(jax.nn.gelu, approximate=True)
    return with_derivative(function, x, forward=(_gelu_tangent,), backward=_gelu_backward)


def _gelu_tangent(x, dx):
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = jnp.tanh(c * (x + a * x**3))
    return dx * (0.5 * (1 + t) + 0.5 * c * x * (1 - t * t) * (1 + 3 * a * x * x))


def _gelu_backward(x, g):
    return (_gelu_tangent(x, g),)  # an elementwise map is its own transpose


def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """x @ kernel, with a backward pass that XLA on CPU computes fast."""
    forward = (lambda x, kernel, dx: dx @ kernel, lambda x, kernel, dkernel: x @ dkernel)
    return with_derivative(jnp.matmul, x, kernel, forward=forward, backward=_matmul_backward)


def _matmul_backward(x, kernel, g):
    # With more than two dimensions XLA on CPU makes transposed copies and multiplies them more slowly. A TPU does not.
    def kernel_gradient_on_cpu(x, g):
        return x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])

    def kernel_gradient(x, g):
        return jnp.tensordot(g, x, 2 * [tuple(range(x.ndim - 1))]).T

    return g @ kernel.T, jax.lax.platform_dependent(x, g, cpu=kernel_gradient_on_cpu, default=kernel_gradient)


Linear = partial(nnx.Linear, dot_general=lambda x, kernel, *_, **__: matmul(x, kernel))


class SelfAttention(nnx.Module):
    """Multi-head self-attention. attention: one of attention.ATTENTION."""

    def __init__(
        self, dim: int, num_heads: int, *, attention: str, dtype: DTypeLike, sharding: Sharding, rngs: nnx.Rngs
    ):
        self.num_heads, self.attention, self.sharding = num_heads, attention, sharding
        # Columns of qkv: head by head, q, k and v of each, so that a tensor-parallel mesh can split the heads.
        self.qkv = Linear(dim, 3 * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = self._by_pallas(x) if self.attention == "pallas" else self._by_xla_or_cudnn(x)
        return self.proj(rearrange(x, "b n h k -> b n (h k)"))

    def _by_xla_or_cudnn(self, x):
        constrain = self.sharding.constrain
        qkv = rearrange(self.qkv(x), "b n (h three k) -> b n h three k", h=self.num_heads, three=3)
        qkv = constrain(qkv, "batch", None, "heads", None, None)
        return constrain(self_attention(qkv, cudnn=self.attention == "cudnn"), "batch", None, "heads", None)

    def _by_pallas(self, x):
        # The kernel has the tokens last. A product with the weights as its first operand writes them so.
        assert self.qkv.bias is not None  # for the type checker
        kernel, bias = (p[...].astype(x.dtype) for p in (self.qkv.kernel, self.qkv.bias))
        qkv = jax.lax.dot_general(kernel, x, (((0,), (2,)), ((), ()))) + bias[:, None, None]
        qkv = rearrange(qkv, "(h three k) b n -> b h three k n", h=self.num_heads, three=3)
        qkv = self.sharding.constrain(qkv, "batch", "heads", None, None, None)
        x = self.sharding.constrain(pallas_attention(qkv, self.sharding), "batch", "heads", None, None)
        return rearrange(x, "b h k n -> b n h k")


class CrossAttention(nnx.Module):
    """Multi-head attention from the tokens to a context."""

    def __init__(self, dim: int, num_heads: int, *, dtype: DTypeLike, sharding: Sharding, rngs: nnx.Rngs):
        self.num_heads, self.sharding = num_heads, sharding
        self.q = Linear(dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.kv = Linear(dim, 2 * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)  # columns as in SelfAttention
        self.proj = Linear(dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
        constrain = self.sharding.constrain
        q = rearrange(self.q(x), "b n (h k) -> b n h k", h=self.num_heads)
        kv = rearrange(self.kv(context), "b m (h two k) -> b m h two k", h=self.num_heads, two=2)
        q = constrain(q, "batch", None, "heads", None)
        kv = constrain(kv, "batch", None, "heads", None, None)
        k, v = (rearrange(a, "b m h 1 k -> b h m k") for a in jnp.split(kv, 2, axis=3))
        q = rearrange(q, "b n h k -> b h n k")
        x = rearrange(attention(q, k, v), "b h n k -> b n h k")
        x = constrain(x, "batch", None, "heads", None)
        return self.proj(rearrange(x, "b n h k -> b n (h k)"))


class Mlp(nnx.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, *, dtype: DTypeLike, sharding: Sharding, rngs: nnx.Rngs):
        self.sharding = sharding
        self.fc1 = Linear(dim, MLP_RATIO * dim, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(MLP_RATIO * dim, dim, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = self.sharding.constrain(self.fc1(x), "batch", None, "units")
        x = self.sharding.constrain(gelu(x), "batch", None, "units")
        return self.fc2(x)


class AdaLNBlock(nnx.Module):
    """adaLN-Zero if `gated`, else adaLN.

    The regression starts at zero. A gated block then is the identity, an ungated one a transformer block with plain
    LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gated: bool,
        attention: str,
        dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ):
        self.gated, self.sharding = gated, sharding
        self.norm1 = layer_norm(dim, affine=False, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, attention=attention, dtype=dtype, sharding=sharding, rngs=rngs)
        self.norm2 = layer_norm(dim, affine=False, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, sharding=sharding, rngs=rngs)
        self.adaLN_modulation = Linear(dim, (6 if gated else 4) * dim, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        if self.gated:
            shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c, 6)
        else:
            shift1, scale1, shift2, scale2 = self._modulation(c, 4)
            gate1 = gate2 = None
        x = x + self._branch(self.attn, modulate(self.norm1(x), shift1, scale1), gate1)
        return x + self._branch(self.mlp, modulate(self.norm2(x), shift2, scale2), gate2)

    def _modulation(self, c, parts):
        """c (B, D) -> shifts, scales and gates, (B, D) each."""
        c = self.sharding.constrain(jax.nn.silu(c), "replica", "width")
        c = self.sharding.constrain(self.adaLN_modulation(c), "batch", "units")
        return jnp.split(self.sharding.constrain(c, "batch", None), parts, axis=-1)

    def _branch(self, sublayer, x, gate):
        """gate * sublayer(x), or sublayer(x) where there is no gate."""
        x = gather_tokens(shard_tokens(x, self.sharding), self.sharding)
        x = shard_tokens(sublayer(x), self.sharding)
        return x if gate is None else gate[:, None] * x


class ViTBlock(nnx.Module):
    """A plain ViT block: the in-context design. With `cross`, the cross-attention design: attention to the condition
    tokens stands between self-attention and MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        cross: bool,
        attention: str,
        dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ):
        self.cross, self.sharding = cross, sharding
        self.norm1 = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, attention=attention, dtype=dtype, sharding=sharding, rngs=rngs)
        self.norm2 = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, sharding=sharding, rngs=rngs)
        if cross:
            self.norm_cross = layer_norm(dim, affine=True, dtype=dtype, rngs=rngs)
            self.cross_attn = CrossAttention(dim, num_heads, dtype=dtype, sharding=sharding, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], tokens: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
        x = x + self._branch(self.attn, self.norm1(x))
        if self.cross:
            x = x + self._branch(self.cross_attn, self.norm_cross(x), tokens)
        return x + self._branch(self.mlp, self.norm2(x))

    def _branch(self, sublayer, x, *context):
        return shard_tokens(sublayer(gather_tokens(x, self.sharding), *context), self.sharding)


def make_block(
    name: str,
    dim: int,
    num_heads: int,
    *,
    attention: str = "xla",
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    sharding: Sharding = NO_SHARDING,
) -> AdaLNBlock | ViTBlock:
    """Returns one block of the design `name`, one of BLOCKS, with self-attention `attention`, one of ATTENTION.

    Raises UserError on another name.
    """
    if attention not in ATTENTION:
        raise UserError(f"unknown attention {attention!r}: use one of {', '.join(ATTENTION)}")
    shared: dict[str, Any] = dict(attention=attention, dtype=dtype, sharding=sharding, rngs=rngs)
    if name in ("adaln_zero", "adaln"):
        return AdaLNBlock(dim, num_heads, gated=name == "adaln_zero", **shared)
    if name in ("cross_attention", "in_context"):
        return ViTBlock(dim, num_heads, cross=name == "cross_attention", **shared)
    raise UserError(f"unknown block design {name!r}: use one of {', '.join(BLOCKS)}")
