"""How large rounding errors of a computation may be: it is run once more with every term moved."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from flaxstab._typing import Array, PyTree
from flaxstab.parity._inputs import is_float

BITS = 29  # of the significand that a moved run keeps: coarse beside float64, fine beside kinks
UNIT = 2.0**-31  # half to all of what rounding to BITS does to a value
DRAWS = 2
OUTLIER = 1e3  # times the first quartile: an element that moves further serves itself alone
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

Compute = Callable[..., PyTree]


def magnitude(compute: Compute, *arguments: PyTree, seed: int = 0) -> PyTree:
    """Returns the magnitude M of each result: eps * M is what rounding in this program can do.

    The program runs once more in float64 with every element of every argument moved by one unit
    of its own size with a random sign, and every intermediate result rounded to that unit; M is
    how far a result then is from the plain run, in units, or its largest value if that is more.
    For a sum this is about its largest term or more, also where terms cancel inside the
    computation: BatchNorm's input gradient on two samples is 0 up to eps, the terms that make it
    are not. NaN and infinity count as 0. A loop (``scan``, ``while``) counts as one operation.

    A poor algorithm has larger terms and so a larger M: it bounds how far two programs of the
    same meaning may be apart, not how far off a good one should be. For that see
    :func:`sensitivity`.

    Args:
      compute: a function to a tree of floating-point arrays.
      *arguments: trees of floating-point arrays, float64 for a reliable result.
      seed: of the random signs.

    Returns:
      A tree like the result's, each array filled with its M.

    Reference:
      D. S. Parker, "Monte Carlo Arithmetic", 1997, UCLA CSD-970002 (random rounding as a
      measure of it).
    """
    return _measure(compute, rounded(compute), arguments, seed)


def sensitivity(compute: Compute, *arguments: PyTree, seed: int = 0) -> PyTree:
    """Returns how far each result moves if the arguments alone move by one unit of their size.

    As :func:`magnitude`, without rounding intermediate results: a property of the function and
    its arguments, the same for every algorithm: eps times it is what rounding the arguments does.
    A program may do better with exact arguments, and where that is claimed (norms at an offset)
    it needs a test of its own.

    Args:
      compute: a function to a tree of floating-point arrays.
      *arguments: trees of floating-point arrays, float64 for a reliable result.
      seed: of the random signs.

    Returns:
      A tree like the result's, each array filled with its sensitivity.
    """
    return _measure(compute, compute, arguments, seed)


def moved(tree: PyTree, seed: int, unit: float = UNIT) -> PyTree:
    """Returns a tree whose floating-point elements are moved by a unit of their size, either way.

    Args:
      tree: of arrays.
      seed: of the signs.
      unit: relative to each element.
    """
    rng = np.random.default_rng(seed)

    def move(leaf: Array) -> Array:
        if not is_float(leaf):
            return leaf
        return leaf * jnp.asarray(1 + unit * rng.choice([-1.0, 1.0], leaf.shape), leaf.dtype)

    return jax.tree.map(move, tree)


def sizes(
    plain: Mapping[str, np.ndarray], moves: Sequence[Mapping[str, np.ndarray]], unit: float = UNIT
) -> dict[str, np.ndarray]:
    """Returns by what each element of each quantity is judged: how far it moves, in units.

    The largest move of the tensor, or its largest value, serves all its elements, for one draw
    says little about one element. Elements that move over 1,000 times further than a quarter of
    the others (masked scores, sentinels) serve themselves alone, or they would hide the others.

    Args:
      plain: quantities of the plain run, by name.
      moves: the same of each moved run.
      unit: of the moves.
    """
    return {
        name: _shared(_moves_of(value, [run[name] for run in moves], unit))
        for name, value in plain.items()
    }


def _moves_of(value: np.ndarray, moves: Sequence[np.ndarray], unit: float) -> np.ndarray:
    """Returns each element's largest move in units, or its size; NaN and infinity count as 0."""
    wide = np.asarray(value, np.float64)
    sizes = [np.abs(wide)]
    if is_float(value):
        with np.errstate(invalid="ignore"):  # infinity minus itself
            sizes += [np.abs(np.asarray(move, np.float64) - wide) / unit for move in moves]
    return np.max(np.where(np.isfinite(sizes), sizes, 0.0), axis=0)


def _shared(sizes: np.ndarray) -> np.ndarray:
    """Returns the largest size for all elements but those that are far larger than most."""
    positive = sizes[sizes > 0]
    if not positive.size:
        return sizes
    ordinary = positive[positive <= OUTLIER * np.quantile(positive, 0.25)]
    return np.maximum(sizes, ordinary.max())


def _measure(compute: Compute, moving: Compute, arguments: tuple[PyTree, ...], seed: int) -> PyTree:
    plain, shape = jax.tree.flatten(compute(*arguments))
    runs = [jax.tree.leaves(moving(*moved(arguments, seed + i))) for i in range(DRAWS)]
    named = [{str(i): np.asarray(a) for i, a in enumerate(leaves)} for leaves in (plain, *runs)]
    found = {n: _moves_of(a, [run[n] for run in named[1:]], UNIT) for n, a in named[0].items()}
    filled = [jnp.full(a.shape, found[str(i)].max(initial=0), a.dtype) for i, a in enumerate(plain)]
    return jax.tree.unflatten(shape, filled)


def rounded(function: Compute, bits: int = BITS) -> Compute:
    """Returns the function with every intermediate floating-point result rounded to some bits.

    Args:
      function: of trees of arrays.
      bits: of the significand, without the leading one.
    """

    def run(*arguments: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _run(closed, jax.tree.leaves(arguments), bits)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _run(closed: core.ClosedJaxpr, arguments: Sequence[Array], bits: int) -> list[Array]:
    """Evaluates a program, rounding every inexact result."""
    jaxpr = closed.jaxpr
    known: dict[object, Array] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: object) -> Array:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for place, eqn in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in eqn.invars]
        body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if body is None:
            result = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = list(result) if eqn.primitive.multiple_results else [result]
            if eqn.primitive.name not in _EXACT:
                outputs = [_round(value, bits, place) for value in outputs]
        else:
            program = body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ())
            outputs = _run(program, inputs, bits)
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _round(value: Array, bits: int, place: int) -> Array:
    """Rounds each element, then moves all by a quarter of the last bit, so that none stays 1."""
    if jnp.result_type(value) != jnp.float64:
        return value  # a program that pins a narrower dtype rounds by itself
    rounded = jax.lax.reduce_precision(value, exponent_bits=11, mantissa_bits=bits)
    return rounded * (1 + (-1) ** place * 2.0 ** -(bits + 2))
