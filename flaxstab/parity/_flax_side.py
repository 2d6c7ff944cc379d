"""Runs a Flax module or a JAX function at any precision, and names the results as torch would."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._typing import Array, DTypeLike
from flaxstab.parity._inputs import STEPS, Inputs, Values, growth, is_float
from flaxstab.parity._magnitude import Measure

Apply = Callable[[object, object, list[Array]], tuple[Array, object]]


class _Program(NamedTuple):
    """A model as pure functions of (parameters, other state, float inputs).

    Attributes:
      train: returns the output and the state after a training step.
      evaluate: the same in evaluation mode.
      params: the parameters.
      rest: statistics and random streams.
      floats: the floating-point inputs.
      is_module: whether there is a mode, and statistics may change.
    """

    train: Apply
    evaluate: Apply
    params: object
    rest: object
    floats: list[Array]
    is_module: bool


class FlaxSide:
    """A Flax module or a JAX function, ready to be run at any precision.

    Args:
      target: the module (it is copied, never changed, and set to training mode), or the function.
    """

    def __init__(self, target: nnx.Module | Callable[..., Array]) -> None:
        self.target = nnx.clone(target) if isinstance(target, nnx.Module) else target
        if isinstance(self.target, nnx.Module):
            self.target.train()

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Gives a module the weights and statistics of its twin."""
        if isinstance(self.target, nnx.Module):
            interop.load_state_dict(self.target, tensors)

    def output_shape(self, arrays: tuple[np.ndarray, ...]) -> tuple[int, ...]:
        """Returns the output's shape."""
        with jax.enable_x64(True):
            program = self._program(arrays, np.float64)
            output, _ = jax.eval_shape(program.train, program.params, program.rest, program.floats)
        return tuple(output.shape)

    def run(self, inputs: Inputs, dtype: DTypeLike) -> Values:
        """Returns every quantity, computed with inputs of the given dtype.

        Parameters and statistics are float64 with float64 inputs, else float32.
        """
        with jax.enable_x64(dtype == np.float64):
            program = self._program(inputs.arrays, dtype)
            return self._named(_quantities(program, inputs, program.params, program.floats))

    def sizes(self, inputs: Inputs, measure: Measure) -> dict[str, float]:
        """Returns the magnitude, or the sensitivity, of every quantity."""
        with jax.enable_x64(True):
            program = self._program(inputs.arrays, np.float64)

            def compute(params: object, floats: list[Array]) -> dict[str, object]:
                found = _quantities(program, inputs, params, floats)
                return jax.tree.map(lambda a: a if is_float(a) else jnp.zeros(a.shape), found)

            filled = self._named(measure(compute, program.params, program.floats))
        return {name: float(np.max(array, initial=0)) for name, array in filled.items()}

    def _program(self, arrays: tuple[np.ndarray, ...], dtype: DTypeLike) -> _Program:
        inputs = [jnp.asarray(a, dtype) if is_float(a) else jnp.asarray(a) for a in arrays]
        where = [i for i, a in enumerate(inputs) if is_float(a)]

        def filled(floats: list[Array]) -> list[Array]:
            replaced = dict(zip(where, floats, strict=True))
            return [replaced.get(i, a) for i, a in enumerate(inputs)]

        floats = [inputs[i] for i in where]
        target = self.target
        if not isinstance(target, nnx.Module):
            function: Apply = jax.jit(lambda _, rest, xs: (target(*filled(xs)), rest))
            return _Program(function, function, {}, {}, floats, is_module=False)
        wide = np.float64 if dtype == np.float64 else np.float32
        params, rest = (
            jax.tree.map(lambda a: jnp.asarray(a, wide) if is_float(a) else a, tree)
            for tree in nnx.split(target, nnx.Param, ...)[1:]
        )

        def apply_mode(model: nnx.Module) -> Apply:
            graph = nnx.graphdef(model)

            def apply(params: object, rest: object, xs: list[Array]) -> tuple[Array, object]:
                merged = nnx.merge(graph, params, rest, copy=True)
                return merged(*filled(xs)), nnx.state(merged, nnx.Not(nnx.Param))

            return jax.jit(apply)

        evaluating = nnx.clone(target)
        evaluating.eval()
        train, evaluate = apply_mode(target), apply_mode(evaluating)
        return _Program(train, evaluate, params, rest, floats, is_module=True)

    def _named(self, found: Mapping[str, object]) -> Values:
        """Gives every array its PyTorch name and layout; a tree of variables becomes several."""
        values = {}
        for key, value in found.items():
            if not isinstance(value, nnx.State):
                values[key] = np.asarray(value)
                continue
            model = nnx.merge(nnx.graphdef(self.target), nnx.state(self.target), copy=True)
            nnx.update(model, value)
            values |= {f"{key} {name}": a for name, a in interop.state_dict(model).items()}
        return values


def _quantities(
    program: _Program, inputs: Inputs, params: object, floats: list[Array]
) -> dict[str, object]:
    """Returns output, gradients, statistics after some training steps, and evaluation by them."""
    output, pullback, rest = jax.vjp(
        lambda p, xs: program.train(p, program.rest, xs), params, floats, has_aux=True
    )
    param_grads, float_grads = pullback(jnp.asarray(inputs.cotangent, output.dtype))
    found: dict[str, object] = {"output": output}
    found |= {f"grad input {i}": g for i, g in enumerate(float_grads)}
    if not program.is_module:
        return {**found, "evaluation": output}
    found["grad"] = param_grads
    for step in range(1, max(STEPS) + 1):
        if step in STEPS:
            found[f"step {step}"] = rest
        grown = [x * jnp.asarray(growth(step), x.dtype) for x in floats]
        _, rest = program.train(params, rest, grown)
    found["evaluation"], _ = program.evaluate(params, rest, floats)
    return found
