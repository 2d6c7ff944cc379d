"""One pass in training of a model and its twin, compiled once: outputs and all gradients."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flaxstab import interop, parity
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same


def assert_one_step(
    ours: nnx.Module,
    twin: torch.nn.Module,
    *inputs: np.ndarray,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Output and gradients of all parameters agree in float64, everything random replayed.

    Args:
      ours: a model of float32 parameters, which are replaced by the twin's.
      twin: its counterpart; it becomes one of float64.
      *inputs: arrays for both.
      rename: from a name of the twin's to ours.
    """
    twin.double()
    interop.load_state_dict(ours, twin.state_dict(), rename=rename)
    with parity.replayed(ours, twin, rename=rename):
        expected = twin(*map(torch.tensor, inputs))
    cotangent = values(*expected.shape, seed=1, offset=0.5)
    expected.backward(torch.tensor(cotangent))
    graph, params, rest = nnx.split(ours, nnx.Param, ...)

    def run(params: Mapping[str, object], *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, params, rest, copy=True)(*arrays)
        return jnp.sum(y * cotangent), y

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
        arrays = [jnp.asarray(array) for array in inputs]
        gradients, y = jax.jit(jax.grad(run, has_aux=True))(wide, *arrays)
        assert_same(y, expected)
        found = interop.state_dict(nnx.merge(graph, gradients, rest))
    # The terms of a gradient are products with the cotangent, of at least its size.
    size = np.abs(cotangent).max()
    for name, parameter in twin.named_parameters():
        assert_same(found[rename(name)], parameter.grad, size)
    assert {rename(name) for name, _ in twin.named_parameters()} <= found.keys()
