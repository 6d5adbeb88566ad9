"""Functions with a derivative that is written out, in forward and in reverse mode."""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def with_derivative(
    function: Callable[..., Array],
    *args: Array,
    forward: Sequence[Callable[..., Array]],
    backward: Callable[..., Sequence[Array]],
) -> Array:
    """Returns function(*args), with a derivative that is written out for forward mode and for reverse mode.

    jax.custom_vjp has no forward mode, and jax.custom_jvp has no backward pass of its own. The result can be
    differentiated again, in any order of the two modes.

    forward: for each argument, f(*args, tangent of the argument) -> its part of the tangent of the result.
    backward: f(*args, gradient of the result) -> the gradients of all arguments. Reverse mode keeps only args for it.
    """
    return _attach_derivative(tuple(forward), backward, function(*jax.lax.stop_gradient(args)), *args)


# The value is computed outside, because the policies of jax.checkpoint do not see inside: "dots" would find no product.
@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attach_derivative(forward, backward, value, *args):
    return value


@partial(_attach_derivative.defjvp, symbolic_zeros=True)
def _attach_derivative_jvp(forward, backward, primals, tangents):
    (value, *args), (_, *tangents) = primals, tangents
    used = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero))
    tangent = tangent_p.bind(*args, *(tangents[i] for i in used), forward=forward, backward=backward, used=used)
    return _attach_derivative(forward, backward, value, *args), tangent


# The tangent of the result: the sum of forward[i](*args, tangent of argument i) over i in used. Reverse mode transposes
# this linear function of the tangents. Only a primitive can have a transpose that is not derived from the function, can
# be differentiated again and can be batched: jax.custom_derivatives.linear_call can do the first only.
tangent_p = Primitive("tangent")


@tangent_p.def_impl
def _tangent(*operands, forward, backward, used):
    args, tangents = operands[: len(forward)], operands[len(forward) :]
    return reduce(operator.add, (forward[i](*args, tangent) for i, tangent in zip(used, tangents)))


@tangent_p.def_abstract_eval
def _tangent_type(*operands, **params):
    return jax.make_jaxpr(partial(_tangent, **params))(*operands).out_avals[0]


def _tangent_jvp(primals, tangents, **params):
    return jax.jvp(partial(_tangent, **params), primals, tuple(ad.instantiate_zeros(t) for t in tangents))


def _tangent_transpose(g, *operands, forward, backward, used):
    gradients = backward(*operands[: len(forward)], ad.instantiate_zeros(g))
    return [None] * len(forward) + [gradients[i] for i in used]


def _tangent_batch(operands, axes, *, forward, backward, used):
    n = len(forward)
    size = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)
    # All tangents get the batch axis, because all gradients have it.
    tangents = (batching.bdim_at_front(x, axis, size) for x, axis in zip(operands[n:], axes[n:]))
    in_axes = (*axes[:n], 0)
    forward, backward = tuple(jax.vmap(f, in_axes) for f in forward), jax.vmap(backward, in_axes)
    return tangent_p.bind(*operands[:n], *tangents, forward=forward, backward=backward, used=used), 0


ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
batching.primitive_batchers[tangent_p] = _tangent_batch
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent, multiple_results=False))
