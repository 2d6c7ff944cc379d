"""How large rounding errors of a computation may be: it is run once more with every term moved."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from flaxstab._typing import Array

_DRAWS = 2
_CALLS = {  # operations that call a program once, and where they keep it; all others are one step
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}  # fmt: skip
_EXACT = {  # operations that round nothing
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice",
    "dynamic_update_slice", "gather", "max", "min", "neg", "pad", "reshape", "rev", "select_n",
    "slice", "squeeze", "transpose",
}  # fmt: skip

Dual = tuple[Array, Array | None]  # a value, and its change if it is floating point
Move = Callable[[Array, Array | None], Array | None]  # from a dual to its new change
Compute = Callable[..., Mapping[str, object]]
Measure = Callable[..., Mapping[str, object]]  # magnitude or sensitivity


def magnitude(compute: Compute, *arguments: object, seed: int = 0) -> Mapping[str, object]:
    """Returns the magnitude M of each result: eps * M is what rounding in this program can do.

    Every element of every argument and of every intermediate result is moved by one unit of its
    own size with a random sign, to first order; M is the largest move that a result shows, or
    its largest value if that is more. For a sum this is about its largest term or more, also
    where terms cancel inside the computation: BatchNorm's input gradient on two samples is 0 up
    to eps, the terms that make it are not. NaN and infinity count as 0.

    A poor algorithm has larger terms and so a larger M: it bounds how far two programs of the
    same meaning may be apart, not how far off a good one should be. For that see
    :func:`sensitivity`.

    Args:
      compute: a differentiable function to a tree of floating-point arrays.
      *arguments: trees of floating-point arrays, float64 for a reliable result.
      seed: of the random signs.

    Returns:
      A tree like the result's, each array filled with its M.

    Reference:
      D. S. Parker, "Monte Carlo Arithmetic", 1997, UCLA CSD-970002 (random rounding as a
      measure of it).
    """
    rng = np.random.default_rng(seed)
    return _measure(compute, arguments, rng, lambda value, change: _moved(value, change, rng))


def sensitivity(compute: Compute, *arguments: object, seed: int = 0) -> Mapping[str, object]:
    """Returns how far each result moves if the arguments alone move by one unit of their size.

    As :func:`magnitude`, without moving intermediate results: a property of the function and its
    arguments, the same for every algorithm: eps times it is what rounding the arguments does. A
    program may do better with exact arguments, and where that is claimed (norms at an offset) it
    needs a test of its own.

    Args:
      compute: a differentiable function to a tree of floating-point arrays.
      *arguments: trees of floating-point arrays, float64 for a reliable result.
      seed: of the random signs.

    Returns:
      A tree like the result's, each array filled with its sensitivity.
    """
    return _measure(compute, arguments, np.random.default_rng(seed), lambda _, change: change)


def _measure(
    compute: Compute, arguments: tuple[object, ...], rng: np.random.Generator, move: Move
) -> Mapping[str, object]:
    closed, shapes = jax.make_jaxpr(compute, return_shape=True)(*arguments)
    leaves, results = jax.tree.leaves(arguments), jax.tree.leaves(shapes)
    largest = [0.0] * len(results)
    for _ in range(_DRAWS):
        moved = [(leaf, _moved(leaf, None, rng)) for leaf in leaves]
        for i, dual in enumerate(_run(closed, moved, move)):
            largest[i] = max(largest[i], *map(_size, dual))
    filled = [jnp.full(s.shape, m) for s, m in zip(results, largest, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), filled)


def _size(array: Array | None) -> float:
    if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return 0.0
    return float(jnp.max(jnp.abs(jnp.where(jnp.isfinite(array), array, 0)), initial=0))


def _moved(value: Array, change: Array | None, rng: np.random.Generator) -> Array | None:
    """Returns a value's change with its own random move added; None if it is not a float."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return None
    own = value * jnp.asarray(rng.choice([-1.0, 1.0], np.shape(value)), value.dtype)
    return own if change is None else change + own


def _run(closed: core.ClosedJaxpr, duals: Sequence[Dual], move: Move) -> list[Dual]:
    """Evaluates a program on values and their changes, moving every rounded result."""
    jaxpr = closed.jaxpr
    known: dict[object, Dual] = {}
    known |= dict(
        zip(jaxpr.constvars, ((jnp.asarray(c), None) for c in closed.consts), strict=True)
    )
    known |= dict(zip(jaxpr.invars, duals, strict=True))

    def read(atom: object) -> Dual:
        return (jnp.asarray(atom.val), None) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if body is None:
            outputs = _apply(eqn, inputs)
            if eqn.primitive.name not in _EXACT:
                outputs = [(value, move(value, change)) for value, change in outputs]
        else:
            program = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
            outputs = _run(program, inputs, move)
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: core.JaxprEqn, inputs: Sequence[Dual]) -> list[Dual]:
    """Applies one operation to values and their changes."""
    where = [i for i, (_, change) in enumerate(inputs) if change is not None]

    def call(*floats: Array) -> tuple[Array, ...]:
        values = [value for value, _ in inputs]
        for i, value in zip(where, floats, strict=True):
            values[i] = value
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return tuple(result) if eqn.primitive.multiple_results else (result,)

    if not where:
        return [(value, None) for value in call()]
    values, changes = jax.jvp(
        call, tuple(inputs[i][0] for i in where), tuple(inputs[i][1] for i in where)
    )
    return [
        (value, change if jnp.issubdtype(value.dtype, jnp.floating) else None)
        for value, change in zip(values, changes, strict=True)
    ]
