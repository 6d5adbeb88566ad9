"""Functions with a derivative that is written out, in forward and in reverse mode."""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def with_derivative(
    function: Callable[..., Array],
    *args: Array,
    forward: Sequence[Callable[..., Array]],
    backward: Callable[..., Sequence[Array]],
    on_forward: Callable[[], None] | None = None,
) -> Array:
    """Returns function(*args), with a derivative that is written out for forward mode and for reverse mode.

    jax.custom_vjp has no forward mode, and jax.custom_jvp has no backward pass of its own. The result can be
    differentiated again, in any order of the two modes.

    forward: for each argument, f(*args, tangent of the argument) -> its part of the tangent of the result.
    backward: f(*args, gradient of the result) -> the gradients of all arguments. Reverse mode keeps only args for it.
    on_forward: called whenever a forward mode is run or compiled.
    """
    return _attach_derivative(tuple(forward), backward, on_forward, function(*jax.lax.stop_gradient(args)), *args)


def with_forward_mode(
    function: Callable[..., Array],
    *args: Array,
    forward: Sequence[Callable[..., Array]],
    name: str,
    on_forward: Callable[[], None] | None = None,
) -> Array:
    """Returns function(*args), of a function that has a reverse mode only: a jax.custom_vjp.

    forward, on_forward: as of with_derivative. name: under which the policies of jax.checkpoint know the result and
    what reverse mode keeps.
    """
    n = len(args)
    value, vjp = jax.vjp(function, *jax.lax.stop_gradient(args))
    kept, tree = jax.tree.flatten(vjp)
    value, kept = checkpoint_name((value, kept), name)

    def tangent_of(f):
        return lambda *operands: f(*operands[:n], operands[-1])

    def backward(*operands):
        gradients = tree.unflatten(operands[n:-1])(operands[-1])
        return *gradients, *[None] * len(kept)  # what is kept has no tangent, so its gradient is not used

    forward = (*map(tangent_of, forward), *[lambda *operands: operands[-1]] * len(kept))
    return _attach_derivative(forward, backward, on_forward, value, *args, *kept)


# The value is computed outside, because the policies of jax.checkpoint do not see inside: "dots" would find no product.
@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _attach_derivative(forward, backward, on_forward, value, *args):
    return value


@partial(_attach_derivative.defjvp, symbolic_zeros=True)
def _attach_derivative_jvp(forward, backward, on_forward, primals, tangents):
    (value, *args), (_, *tangents) = primals, tangents
    used = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero))
    functions = dict(forward=forward, backward=backward, on_forward=on_forward)
    tangent = tangent_p.bind(*args, *(tangents[i] for i in used), **functions, used=used)
    return _attach_derivative(forward, backward, on_forward, value, *args), tangent


# The tangent of the result: the sum of forward[i](*args, tangent of argument i) over i in used. Reverse mode transposes
# this linear function of the tangents. Only a primitive can have a transpose that is not derived from the function, can
# be differentiated again and can be batched: jax.custom_derivatives.linear_call can do the first only.
tangent_p = Primitive("tangent")


def _tangent(*operands, forward, used, **_):
    args, tangents = operands[: len(forward)], operands[len(forward) :]
    return reduce(operator.add, (forward[i](*args, tangent) for i, tangent in zip(used, tangents)))


@tangent_p.def_impl
def _run_tangent(*operands, on_forward, **params):
    if on_forward:
        on_forward()
    return _tangent(*operands, **params)


@tangent_p.def_abstract_eval
def _tangent_type(*operands, **params):
    return jax.make_jaxpr(partial(_tangent, **params))(*operands).out_avals[0]


def _tangent_jvp(primals, tangents, **params):
    return jax.jvp(partial(_run_tangent, **params), primals, tuple(ad.instantiate_zeros(t) for t in tangents))


def _tangent_transpose(g, *operands, forward, backward, used, **_):
    gradients = backward(*operands[: len(forward)], ad.instantiate_zeros(g))
    return [None] * len(forward) + [gradients[i] for i in used]


def _tangent_batch(operands, axes, *, forward, backward, used, **params):
    n = len(forward)
    size = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)
    # All tangents get the batch axis, because all gradients have it.
    tangents = (batching.bdim_at_front(x, axis, size) for x, axis in zip(operands[n:], axes[n:]))
    in_axes = (*axes[:n], 0)
    forward, backward = tuple(jax.vmap(f, in_axes) for f in forward), jax.vmap(backward, in_axes)
    return tangent_p.bind(*operands[:n], *tangents, forward=forward, backward=backward, used=used, **params), 0


ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
batching.primitive_batchers[tangent_p] = _tangent_batch
mlir.register_lowering(tangent_p, mlir.lower_fun(_run_tangent, multiple_results=False))
