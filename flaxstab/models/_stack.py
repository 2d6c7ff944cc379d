"""Depth: blocks one after the other, as a list or as one block with one more axis."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array

Call = Callable[[nnx.Module, Array], Array]


class Stack(nnx.Module):
    """Equal blocks as one: every array of ``layers`` has the blocks along a new first axis.

    :func:`run` takes the blocks in turn by ``nnx.scan``, so that the program does not grow with
    depth. The numbers are those of the blocks: parameters, statistics and random streams are moved,
    not drawn anew.

    Args:
      blocks: at least one, all of one structure and in one mode.

    Attributes:
      layers: the stacked block. It cannot be called as it is.
      depth: how many blocks there are.

    Raises:
      ValueError: if the blocks differ in anything but the values of their arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> blocks = [linear.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3)]
      >>> stack = Stack(blocks)
      >>> stack.layers.kernel[...].shape
      (3, 4, 4)
      >>> bool((run(stack, jnp.ones((2, 4))) == run(blocks, jnp.ones((2, 4)))).all())
      True
    """

    def __init__(self, blocks: Sequence[nnx.Module]) -> None:
        check(len(blocks) > 0, "a stack needs at least one block", blocks=len(blocks))
        parts = [nnx.split(block) for block in blocks]
        graph, state = parts[0]
        for place, (other, values) in enumerate(parts):
            same = other == graph and _shapes(values) == _shapes(state)
            check(
                same,
                "the blocks of a stack must be equal but for their values",
                fix="Leave the one that differs out of the stack.",
                block=place,
            )
        states = [values for _, values in parts]
        self.layers = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        self.depth = len(blocks)

    def unstacked(self) -> list[nnx.Module]:
        """Returns the blocks as they are now, each for itself, with copies of their arrays."""
        graph, state = nnx.split(self.layers)
        return [
            nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            for i in range(self.depth)
        ]


def _shapes(state: nnx.State) -> list[tuple[object, object]]:  # type: ignore[type-arg]
    return [(jnp.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(state)]


def run(
    blocks: Stack | Sequence[nnx.Module],
    x: Array,
    call: Call = lambda block, x: block(x),
    *,
    remat: bool = False,
) -> Array:
    """Calls blocks one after the other, each with what the one before returned.

    Running statistics and random streams move as in a loop.

    Args:
      blocks: a list of blocks, or a stack, of which each must return the shape and dtype it gets.
      x: what the first one gets.
      call: how to call a block, where more than an array is needed. What it closes over must be
        the same for all.
      remat: whether each block keeps its input alone for the backward pass, and is computed again.

    Returns:
      What the last one returns.
    """
    step = nnx.remat(call) if remat else call
    if not isinstance(blocks, Stack):
        for block in blocks:
            x = step(block, x)
        return x

    def body(x: Array, block: nnx.Module) -> Array:
        return step(block, x)

    scan = nnx.scan(body, length=blocks.depth, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return scan(x, blocks.layers)
