"""Runs a Flax module or a JAX function at any precision, and names the results as torch would."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, PyTree
from flaxstab.parity._inputs import (
    STEPS,
    Inputs,
    Values,
    growth,
    is_float,
    is_integral,
    named_leaves,
    round_to,
)
from flaxstab.parity._magnitude import DRAWS, UNIT, moved, rounded, sizes
from flaxstab.parity._place import located
from flaxstab.parity._precision import EXACT, Precision, jax_at
from flaxstab.parity._program import Modes, Program


class Compiled(NamedTuple):
    """A program's gradients, a training step and evaluation, as compiled functions."""

    gradients: Callable[..., tuple[PyTree, ...]]
    step: Callable[..., tuple[Mapping[str, Array], PyTree]]
    evaluate: Callable[..., tuple[Mapping[str, Array], PyTree]]


class FlaxSide:
    """A program, ready to be run at any precision; it is compiled once for each.

    Args:
      program: what to run.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._plain = compiled_program(program, lambda function: function)
        self._rounded = compiled_program(program, rounded)

    def output_shapes(self, arrays: tuple[np.ndarray, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the floating-point outputs, by name."""
        with jax_at(EXACT), located("Flax", self.program.names(), arrays):
            inputs = as_inputs(arrays, np.float64)
            variables = self.variables(EXACT)
            output, _ = jax.eval_shape(self.program.train, *variables, inputs)
            leaves = named_leaves("output", output)
        kinds = [str(a.dtype) for a in leaves.values()]
        check(not any("complex" in k for k in kinds), "outputs must be real", outputs=kinds)
        return {n: tuple(a.shape) for n, a in leaves.items() if is_float(a)}

    def run(self, fed: Inputs, precision: Precision = EXACT) -> Values:
        """Returns every quantity at a precision."""
        with jax_at(precision):
            params, rest = self.variables(precision)
            return self._quantities(self._plain, fed, precision.compute, params, rest)

    def magnitudes(self, fed: Inputs, plain: Values, precision: Precision) -> Values:
        """Returns the magnitude of every quantity of a float64 run."""
        return sizes(plain, [self._moved(self._rounded, fed, i, precision) for i in range(DRAWS)])

    def sensitivities(self, fed: Inputs, plain: Values, precision: Precision) -> Values:
        """Returns the sensitivity of every quantity of a float64 run."""
        return sizes(plain, [self._moved(self._plain, fed, i, precision) for i in range(DRAWS)])

    def spreads(self, fed: Inputs, plain: Values, precision: Precision, dtype: DTypeLike) -> Values:
        """Returns how far every quantity moves, in eps, if every operation rounds to a dtype."""
        info = jnp.finfo(dtype)
        compiled = compiled_program(self.program, lambda function: rounded(function, info.nmant))
        unit = float(info.eps)
        runs = [self._moved(compiled, fed, i, precision, unit) for i in range(DRAWS)]
        return sizes(plain, runs, unit)

    def _moved(
        self,
        compiled: Compiled,
        fed: Inputs,
        seed: int,
        precision: Precision,
        unit: float = UNIT,
    ) -> Values:
        with jax_at(EXACT):
            params, rest = self.variables(precision)
            floats = [a for a in fed.arrays if is_float(a)]
            params, moving, cotangents = moved((params, floats, fed.cotangents), seed, unit)
            # Masks and classes given as floats stay: moving them would cross jumps.
            kept = (a if is_integral(a) else b for a, b in zip(floats, moving, strict=True))
            given = iter(kept)
            arrays = tuple(next(given) if is_float(a) else a for a in fed.arrays)
            fed = fed._replace(arrays=arrays, cotangents=cotangents)
            return self._quantities(compiled, fed, np.float64, params, rest)

    def variables(self, precision: Precision) -> tuple[PyTree, PyTree]:
        """Returns the parameters and the other variables as a precision says."""
        params, rest = stored_as(self.program.variables(), precision)
        return params, rest

    def _quantities(
        self, compiled: Compiled, fed: Inputs, dtype: DTypeLike, params: PyTree, rest: PyTree
    ) -> Values:
        with located("Flax", self.program.names(), fed.arrays):
            return self._located(compiled, fed, dtype, params, rest)

    def _located(
        self, compiled: Compiled, fed: Inputs, dtype: DTypeLike, params: PyTree, rest: PyTree
    ) -> Values:
        inputs, named = as_inputs(fed.arrays, dtype), self.program
        cotangents = {name: jnp.asarray(a) for name, a in fed.cotangents.items()}
        outputs, (param_grads, grads), rest = compiled.gradients(params, rest, inputs, cotangents)
        found = dict(outputs)
        found |= {f"grad input {i}": g for i, g in enumerate(grads)}
        found |= {f"grad {n}": a for n, a in named.named(param_grads, gradients=True).items()}
        evaluated = outputs
        if named.is_module:
            for step in range(1, max(STEPS) + 1):
                if step > 1:
                    grown = [_grown(x, step - 1) for x in inputs]
                    outputs, rest = compiled.step(params, rest, grown)
                if step in STEPS[1:]:
                    found |= {f"step {step} {n}": a for n, a in outputs.items()}
                if step in STEPS:
                    found |= {f"step {step} {n}": a for n, a in named.named(rest).items()}
            evaluated, rest = compiled.evaluate(params, rest, inputs)
            found |= {f"after evaluation {n}": a for n, a in named.named(rest).items()}
        found |= {n.replace("output", "evaluation", 1): a for n, a in evaluated.items()}
        return {name: np.asarray(a) for name, a in found.items()}


def stored_as(tree: PyTree, precision: Precision) -> PyTree:
    """Returns variables rounded as the precision says, in its wide dtype.

    Args:
      tree: of arrays.
      precision: how they are to be computed with.
    """

    def cast(leaf: Array) -> Array:
        if not is_float(leaf):
            return leaf
        return jnp.asarray(round_to(np.asarray(leaf), precision.stored), precision.wide)

    return jax.tree.map(cast, tree)


def compiled_program(program: Modes, transform: Callable[..., Callable[..., object]]) -> Compiled:
    """Returns a program's three functions, transformed and compiled when they are first run."""

    def gradients(
        params: PyTree, rest: PyTree, inputs: list[Array], cotangents: Mapping[str, Array]
    ) -> tuple[PyTree, ...]:
        where = [i for i, a in enumerate(inputs) if is_float(a)]

        def forward(params: PyTree, floats: list[Array]) -> tuple[PyTree, PyTree]:
            given = dict(zip(where, floats, strict=True))
            full = [given.get(i, a) for i, a in enumerate(inputs)]
            output, after = program.train(params, rest, full)
            outputs = named_leaves("output", output)
            return {n: a for n, a in outputs.items() if is_float(a)}, (outputs, after)

        floats = [inputs[i] for i in where]
        smooth, pullback, (outputs, after) = jax.vjp(forward, params, floats, has_aux=True)
        pulled = {n: jnp.asarray(cotangents[n], a.dtype) for n, a in smooth.items()}
        return outputs, pullback(pulled), after

    def step(
        params: PyTree, rest: PyTree, inputs: list[Array]
    ) -> tuple[Mapping[str, object], PyTree]:
        output, after = program.train(params, rest, inputs)
        return named_leaves("output", output), after

    def evaluate(
        params: PyTree, rest: PyTree, inputs: list[Array]
    ) -> tuple[Mapping[str, object], PyTree]:
        output, after = program.evaluate(params, rest, inputs)
        return named_leaves("output", output), after

    return Compiled(*(jax.jit(transform(f)) for f in (gradients, step, evaluate)))


def as_inputs(arrays: tuple[np.ndarray, ...], dtype: DTypeLike) -> list[Array]:
    """Returns a program's inputs, floating-point ones in a dtype."""
    return [jnp.asarray(a, dtype) if is_float(a) else jnp.asarray(a) for a in arrays]


def _grown(array: Array, step: int) -> Array:
    if not is_float(array) or is_integral(np.asarray(array)):
        return array
    return array * jnp.asarray(growth(step), array.dtype)
