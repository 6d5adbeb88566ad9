"""Self-attention, softmax(q k^T / sqrt(K)) v (Attention Is All You Need, equation 1), as different compilers run it.

| name   | what runs                                                                                                |
|--------|----------------------------------------------------------------------------------------------------------|
| xla    | two products and a softmax. The weights (B, H, N, N) go through memory several times                     |
| pallas | a kernel for TPU v4 and later. The weights never leave the chip; the backward pass makes them again       |
| cudnn  | the kernel of NVIDIA's library, through jax.nn.dot_product_attention. bfloat16 or float16                |

All take the softmax and every sum in float32, and round the weights to the compute dtype for the product with v. The
pallas kernel has all keys of a query at hand, so its softmax is the plain one. It differs from XLA's only in that it
rounds the weights before it divides by their sum, which rounds by the same relative error.

Shapes: B batch, N tokens (M of a context), H heads, K width of a head. Of the pallas kernel's arrays the tokens are the
last dimension, because a TPU's memory pads that one to 128, and a head is 64 or 72 wide.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dit_jax.models.derivatives import with_derivative, with_forward_mode
from dit_jax.runtime.progress import say

if TYPE_CHECKING:
    from dit_jax.models.blocks import Sharding

ATTENTION = ("xla", "pallas", "cudnn")
# Elements of the float32 scores that the kernel works on at once: 1 MiB of a TPU v4's 16 MiB of vector memory.
SCORES_AT_ONCE = 2**18
TOKENS_AT_ONCE = 2048  # of all heads of one step of the kernel: enough bytes to hide what a step costs


def attention(
    q: Float[Array, "b h n k"], k: Float[Array, "b h m k"], v: Float[Array, "b h m k"]
) -> Float[Array, "b h n k"]:
    """Returns the attention of the queries q to a context, by XLA."""
    scores = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    # The name makes dit.REMAT["dots"] keep the result. That policy recomputes products with batch dimensions.
    return checkpoint_name(jnp.einsum("bhnm,bhmk->bhnk", weights, v), "attention")


def self_attention(qkv: Float[Array, "b n h 3 k"], cudnn: bool = False) -> Float[Array, "b n h k"]:
    """Returns the attention of the tokens to each other, by XLA or by cuDNN."""
    if not cudnn:
        # Split, not indexed: the gradient of a split is one concatenation, that of indices a sum of padded arrays.
        q, k, v = (rearrange(a, "b n h 1 k -> b h n k") for a in jnp.split(qkv, 3, axis=3))
        return rearrange(attention(q, k, v), "b h n k -> b n h k")

    def kernel(qkv):
        return jax.nn.dot_product_attention(*(qkv[:, :, :, i] for i in range(3)), implementation="cudnn")

    tangent = partial(_tangent, self_attention)
    return with_forward_mode(kernel, qkv, forward=(tangent,), name="attention", on_forward=_say_xla)


def pallas_attention(qkv: Float[Array, "b h 3 k n"], sharding: "Sharding") -> Float[Array, "b h k n"]:
    """Returns the attention of the tokens to each other, by the kernel."""

    def by_xla(qkv):
        return rearrange(self_attention(rearrange(qkv, "b h three k n -> b n h three k")), "b n h k -> b h k n")

    # Both names make dit.REMAT["dots"] keep what the backward pass needs: qkv with its bias, not the product before.
    qkv = checkpoint_name(qkv, "attention")
    return with_derivative(
        lambda qkv: checkpoint_name(sharding.map_heads(_run_forward, qkv), "attention"),
        qkv,
        forward=(partial(_tangent, by_xla),),
        backward=lambda qkv, g: (sharding.map_heads(_run_backward, qkv, g),),
        on_forward=_say_xla,
    )


def _tangent(function, x, dx):
    return jax.jvp(function, (x,), (dx,))[1]


@cache
def _say_xla():
    say("attention: the kernel has no forward mode; the derivative in forward mode is XLA's")


def _dot(a, b, axis_a, axis_b):
    """The product of two matrices over one axis of each, summed in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _weights(q, k):
    """q (K, n), k (K, N) -> weights (N, n) before they are divided by their sums, and the sums (1, n), float32."""
    scores = _dot(k, q, 0, 0) / math.sqrt(q.shape[0])
    weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
    return weights, weights.sum(axis=0, keepdims=True)


def _query_blocks(tokens):
    """The slices of the queries whose scores are made at once."""
    size = max(128, SCORES_AT_ONCE // tokens // 128 * 128)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _forward_kernel(qkv, out):
    """qkv (H, 3, K, N), out (H, K, N): references to the heads of one step."""
    heads, _, _, tokens = qkv.shape
    for head in range(heads):
        k, v = qkv[head, 1], qkv[head, 2]
        for at in _query_blocks(tokens):
            weights, total = _weights(qkv[head, 0, :, at], k)
            out[head, :, at] = (_dot(v, weights.astype(v.dtype), 1, 0) / total).astype(out.dtype)


def _backward_kernel(qkv, g, grad):
    """qkv (H, 3, K, N), g (H, K, N): references to a step's heads and its gradient; grad (H, 3, K, N): of qkv."""
    heads, _, width, tokens = qkv.shape
    for head in range(heads):
        k, v = qkv[head, 1], qkv[head, 2]
        grad_k = grad_v = jnp.zeros((width, tokens), jnp.float32)
        for at in _query_blocks(tokens):
            q, g_at = qkv[head, 0, :, at], g[head, :, at]
            weights, total = _weights(q, k)
            weights = weights / total
            grad_weights = _dot(v, g_at, 0, 0)
            grad_scores = weights * (grad_weights - (weights * grad_weights).sum(axis=0, keepdims=True))
            grad_scores = (grad_scores / math.sqrt(width)).astype(v.dtype)
            grad_v += _dot(g_at, weights.astype(v.dtype), 1, 1)
            grad_k += _dot(q, grad_scores, 1, 1)
            grad[head, 0, :, at] = _dot(k, grad_scores, 1, 0).astype(grad.dtype)
        grad[head, 1], grad[head, 2] = grad_k.astype(grad.dtype), grad_v.astype(grad.dtype)


def _run_forward(qkv: Float[Array, "b h 3 k n"]) -> Float[Array, "b h k n"]:
    shape = (*qkv.shape[:2], *qkv.shape[3:])
    return _run(_forward_kernel, 2, jax.ShapeDtypeStruct(shape, qkv.dtype), qkv)


def _run_backward(qkv: Float[Array, "b h 3 k n"], g: Float[Array, "b h k n"]) -> Float[Array, "b h 3 k n"]:
    return _run(_backward_kernel, 5, jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), qkv, g)


def _run(kernel: Callable[..., None], products: int, result: jax.ShapeDtypeStruct, *arrays: Array) -> Array:
    """Runs a kernel over the examples and groups of heads of arrays (B, H, ..., K, N). On a CPU it is interpreted.

    products: how many matrix products of N * N * K it makes of each head.
    """
    from jax.experimental import pallas as pl  # not at the top: it takes time, and only a TPU needs it
    from jax.experimental.pallas import tpu as pltpu

    batch, heads, *_, width, tokens = arrays[0].shape
    at_once = max((n for n in range(1, heads + 1) if heads % n == 0 and n * tokens <= TOKENS_AT_ONCE), default=1)

    def block(array: Any):
        rest = array.shape[2:]
        return pl.BlockSpec((None, at_once, *rest), lambda example, group: (example, group, *[0] * len(rest)))

    def run(interpret, *arrays):
        return pl.pallas_call(
            kernel,
            grid=(batch, heads // at_once),
            in_specs=[block(array) for array in arrays],
            out_specs=block(result),
            out_shape=result,
            interpret=interpret,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            # For XLA's schedule, and for preflight, which cannot see the products.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * batch * heads * tokens**2 * width,
                transcendentals=batch * heads * tokens**2,
                bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in (*arrays, result)),
            ),
        )(*arrays)

    return jax.lax.platform_dependent(*arrays, cpu=partial(run, True), default=partial(run, False))
