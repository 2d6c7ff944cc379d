"""How many bytes a function keeps for its backward pass."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

from flaxstab._typing import Array


def kept_bytes(f: Callable[..., object], *args: Array, parameters: Sequence[Array] = ()) -> int:
    """Returns the bytes of the arrays that ``jax.vjp(jax.jit(f), *args)`` holds.

    An array that is held twice counts once. The arguments count, too, where the backward pass reads
    them: they must live until then.

    Args:
      f: a differentiable function of arrays.
      *args: what to call it with. What ``f`` closes over becomes a constant of the program and is
        not counted, so pass arrays as arguments.
      parameters: those of ``args`` that live anyway and are not to be counted. A copy of one, in
        another shape or dtype, is counted.
    """
    _, pullback = jax.vjp(jax.jit(f), *args)
    held = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    buffers = {array.unsafe_buffer_pointer(): array.nbytes for array in held}
    for array in parameters:
        buffers.pop(array.unsafe_buffer_pointer(), None)
    return sum(buffers.values())


def kept_by_module(
    module: nnx.Module,
    *inputs: Array,
    call: Callable[..., object] = lambda module, *inputs: module(*inputs),
) -> int:
    """Returns the bytes that one call of a module holds in training.

    Its parameters and running statistics do not count, keys and counts of its random streams do.
    What the call changes is returned with its result.

    Args:
      module: the module.
      *inputs: arrays to call it with.
      call: how to call it.
    """
    graph, params, others = nnx.split(module, nnx.Param, ...)

    def run(params: nnx.State, others: nnx.State, *inputs: Array) -> object:
        own = nnx.merge(graph, params, others)
        y = call(own, *inputs)
        return y, jax.lax.stop_gradient(nnx.state(own, nnx.Not(nnx.Param)))

    known = jax.tree.leaves((params, nnx.filter_state(others, nnx.BatchStat)))
    return kept_bytes(run, params, others, *inputs, parameters=known)
