"""How many bytes a function keeps for its backward pass."""

from collections.abc import Callable, Sequence

import jax

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
