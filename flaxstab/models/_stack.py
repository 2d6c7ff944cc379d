"""Blocks one behind the other: as they are, or stacked and run by one loop."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check, check_positive
from flaxstab._typing import Array, PyTree
from flaxstab.functional._recompute import recomputed
from flaxstab.interop import register_container
from flaxstab.norms._fused import Layers, called, region

M = TypeVar("M", bound=nnx.Module)


class Stack(nnx.Module):
    """Equal blocks, run one behind the other by a loop that is compiled once.

    Every array of ``block`` has one more axis in front, with an entry for each block: parameters,
    statistics, the keys of dropout. So a program of 48 blocks is as long as one of 4. Parameters
    keep their roles for :func:`flaxstab.optim.decay_mask` and :mod:`flaxstab.surgery`.

    Args:
      blocks: modules that map an array to one of its shape and dtype, equal but for the values of
        their arrays, which are copied.
      remat: whether the backward pass keeps each block's input only, and computes the rest again.
      unroll: how many blocks one round of the loop holds.

    Raises:
      ValueError: if there is no block, two of them differ or share a variable, or ``unroll`` is
        below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> rngs = nnx.Rngs(0)
      >>> stack = Stack([linear.Linear(4, 4, rngs=rngs) for _ in range(3)])
      >>> stack.block.kernel.shape, stack(jnp.ones((2, 4))).shape
      ((3, 4, 4), (2, 4))

    Differs from:
      blocks built by ``nnx.vmap`` and run by ``nnx.scan``: these start with the keys, and so the
      weights, that they have in a list, and evaluation writes nothing.
    """

    def __init__(
        self, blocks: Sequence[nnx.Module], *, remat: bool = False, unroll: int = 1
    ) -> None:
        check(len(blocks) > 0, "a stack needs at least one block", blocks=len(blocks))
        check_positive(unroll=unroll)
        for number, block in enumerate(blocks):
            difference = _difference(blocks[0], block)
            check(
                not difference,
                "stacked blocks must be equal but for the values of their arrays",
                fix="Stack each run of equal blocks for itself.",
                block=number,
                differs_in=difference,
            )
        check(
            not _sharing(blocks),
            "stacked blocks must hold variables of their own",
            fix="Give each an activation of its own, or one without parameters.",
            shared=_sharing(blocks),
        )
        together = jax.tree.map(lambda *a: jnp.stack(a), *[nnx.state(b) for b in blocks])
        self.block = nnx.merge(nnx.graphdef(blocks[0]), together)
        self.length = len(blocks)
        self.remat = remat
        self.unroll = unroll

    def __call__(self, x: Array, *inputs: PyTree) -> Array:
        """Maps ``x`` through the blocks, each called ``block(x, *inputs)``."""
        return self.run(lambda block, x: block(x, *inputs), x)

    def run(self, call: Callable[..., Array], x: Array) -> Array:
        """Maps ``x`` through the blocks by ``x = call(block, x)``.

        Args:
          call: a function of a block and an array to an array of the same shape and dtype.
          x: the first block's input.
        """
        layers: Layers = (self.block,)
        graph, state = nnx.split(layers)
        plain: Callable[..., tuple[Array, PyTree]] = partial(called, call, graph)
        # Forward and backward pass are loops of their own: there is nothing to keep apart.
        step = recomputed(plain, prevent_cse=False) if self.remat else plain
        y, moved = jax.lax.scan(
            lambda x, state: step(state, x), x, state, length=self.length, unroll=self.unroll
        )
        nnx.update(layers, moved)
        return y

    def blocks(self) -> list[nnx.Module]:
        """Returns copies of the blocks, one by one."""
        graph, state = nnx.split(self.block)
        entries = (jax.tree.map(lambda a, i=i: a[i], state) for i in range(self.length))
        return [nnx.merge(graph, entry) for entry in entries]


class Chain(nnx.List[nnx.Module]):
    """A list of blocks that run one behind the other; equal neighbours may be one :class:`Stack`.

    With ``scan=True`` each run of two or more equal blocks is one element, a stack. In PyTorch
    each block has its own name, stacked or not, as in a ``torch.nn.Sequential`` or
    ``ModuleList``: ``layer1.0``, ``layer1.1``.

    Args:
      blocks: the modules, each called ``block(x, *inputs)``.
      scan: whether equal neighbours are stacked.
      remat: whether the backward pass keeps each block's input only, and computes the rest again.
      unroll: how many blocks one round of a stack's loop holds.

    Raises:
      ValueError: if ``unroll`` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> rngs = nnx.Rngs(0)
      >>> first = linear.Linear(4, 8, rngs=rngs)
      >>> chain = Chain([first, *(linear.Linear(8, 8, rngs=rngs) for _ in range(3))], scan=True)
      >>> [type(part).__name__ for part in chain], chain(jnp.ones((2, 4))).shape
      (['Linear', 'Stack'], (2, 8))
    """

    def __init__(
        self,
        blocks: Iterable[nnx.Module],
        *,
        scan: bool = False,
        remat: bool = False,
        unroll: int = 1,
    ) -> None:
        check_positive(unroll=unroll)
        runs = _runs(blocks) if scan else ([block] for block in blocks)
        super().__init__(
            Stack(run, remat=remat, unroll=unroll) if len(run) > 1 else run[0] for run in runs
        )
        self.scan = scan
        self.remat = remat
        self.unroll = unroll

    def __call__(self, x: Array, *inputs: PyTree) -> Array:
        """Maps ``x`` through the blocks, each called ``block(x, *inputs)``."""
        return self.run(lambda block, x: block(x, *inputs), x)

    def run(self, call: Callable[..., Array], x: Array) -> Array:
        """Maps ``x`` through the blocks by ``x = call(block, x)``."""
        for part in self:
            if isinstance(part, Stack):
                x = part.run(call, x)
            else:
                x = region(call, (part,), x) if self.remat else call(part, x)
        return x

    def blocks(self) -> list[nnx.Module]:
        """Returns the blocks one by one, those of stacks as copies."""
        parts = (part.blocks() if isinstance(part, Stack) else [part] for part in self)
        return [block for part in parts for block in part]


def stacked(model: M, *, unroll: int = 1) -> M:
    """Returns a copy of a model that runs equal neighbours of its chains by a loop.

    The same numbers from a shorter program; for a model that was seeded as by PyTorch, which needs
    each block by its own name.

    Args:
      model: a model with a :class:`Chain` of blocks, as those of this package; it is unchanged.
      unroll: how many blocks one round of the loop holds.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import models
      >>> size = models.ResNetSize(block="basic", layers=(3,), width=2)
      >>> model = models.ResNet(size, 10, rngs=nnx.Rngs(0))
      >>> len(model.layer1), models.stacked(model).layer1[0].length
      (3, 3)
    """
    return _rebuilt(model, scan=True, unroll=unroll)


def unstacked(model: M) -> M:
    """Returns a copy of a model with every block of its chains for itself, as in PyTorch.

    Args:
      model: a model with a :class:`Chain` of blocks; it is unchanged.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import interop, models
      >>> size = models.ResNetSize(block="basic", layers=(3,), width=2)
      >>> model = models.ResNet(size, 10, scan=True, rngs=nnx.Rngs(0))
      >>> [name for name in interop.state_dict(models.unstacked(model)) if "conv2" in name]
      ['layer1.0.conv2.weight', 'layer1.1.conv2.weight', 'layer1.2.conv2.weight']
    """
    return _rebuilt(model, scan=False, unroll=1)


def _block_names(stack: Stack) -> dict[tuple[object, ...], tuple[str, ...]]:
    return {("block",): tuple(map(str, range(stack.length)))}


def _names(chain: Chain) -> dict[tuple[object, ...], str | tuple[str, ...]]:
    """Returns what PyTorch calls the parts of a chain: blocks have numbers, stacks have none."""
    names: dict[tuple[object, ...], str | tuple[str, ...]] = {}
    count = 0
    for place, part in enumerate(chain):
        length = part.length if isinstance(part, Stack) else 1
        numbers = tuple(str(count + n) for n in range(length))
        stacked = isinstance(part, Stack)
        names |= {(place, "block"): numbers} if stacked else {(place,): numbers[0]}
        count += length
    return names


register_container(Stack, _block_names)
register_container(Chain, _names)


def _rebuilt(model: M, *, scan: bool, unroll: int) -> M:
    check(isinstance(model, nnx.Module), "model must be an nnx.Module", type=type(model).__name__)

    check(
        not isinstance(model, Stack),
        "model must hold its blocks in a Chain",
        fix="Of a Stack itself take stack.blocks().",
        type="Stack",
    )
    done: dict[int, tuple[nnx.Module, nnx.Module]] = {}  # what is held twice stays one

    def of(node: nnx.Module) -> nnx.Module:
        if id(node) not in done:
            done[id(node)] = node, node
            done[id(node)] = node, rebuilt(node)
        return done[id(node)][1]

    def rebuilt(node: nnx.Module) -> nnx.Module:
        if isinstance(node, Chain):
            parts = (of(block) for block in node.blocks())
            return Chain(parts, scan=scan, remat=node.remat, unroll=unroll)
        for name, value in list(vars(node).items()):
            if isinstance(value, nnx.Module):
                setattr(node, name, of(value))
        return node

    return cast("M", of(nnx.clone(model, graph=True)))


def _runs(blocks: Iterable[nnx.Module]) -> list[list[nnx.Module]]:
    """Returns neighbours that are equal but for the values of their arrays as one list each."""
    runs: list[list[nnx.Module]] = []
    for block in blocks:
        if runs and not _difference(runs[-1][0], block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _sharing(blocks: Iterable[nnx.Module]) -> list[str]:
    """Returns the paths of variables that two of the blocks hold."""
    held = [
        {id(v): ".".join(map(str, path)) for path, v in nnx.to_flat_state(nnx.state(block))}
        for block in blocks
    ]
    times = Counter(variable for block in held for variable in block)
    return sorted({path for block in held for v, path in block.items() if times[v] > 1})


def _difference(one: nnx.Module, other: nnx.Module) -> str:
    """Returns where two modules differ in more than the values of their arrays; '' if nowhere."""
    if nnx.graphdef(one) != nnx.graphdef(other):
        return next(_unequal_settings(one, other), "structure")
    flat = (nnx.to_flat_state(nnx.state(module)) for module in (one, other))
    for (path, left), (_, right) in zip(*flat, strict=True):
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return ".".join(map(str, path))
    return ""


def _unequal_settings(one: nnx.Module, other: nnx.Module) -> Iterator[str]:
    simple = (bool, int, float, str, tuple)
    for (path, left), (_, right) in zip(
        nnx.iter_modules(one), nnx.iter_modules(other), strict=False
    ):
        for name, value in vars(left).items():
            if isinstance(value, simple) and value != vars(right).get(name):
                yield ".".join(map(str, (*path, name)))
