"""The order in which a model was put together, as far as NNX leaves it in the model."""

from collections.abc import Iterator
from itertools import pairwise

from flax import nnx

_NODE = nnx.Pytree  # modules and NNX's own lists and dictionaries


def attributes(node: nnx.Pytree) -> dict[str, object]:
    """Returns a node's attributes in the order in which they lie in it, without NNX's own."""
    return {n: value for n, value in vars(node).items() if not n.startswith("_pytree__")}


def modules_of(model: nnx.Module) -> Iterator[nnx.Module]:
    """Yields every module once, children before parents, in the order of their assignment."""
    yield from _walk(model, set())


def _walk(node: object, seen: set[int]) -> Iterator[nnx.Module]:
    if id(node) in seen:
        return
    if isinstance(node, _NODE):
        seen.add(id(node))
        for child in _children(node):
            yield from _walk(child, seen)
        if isinstance(node, nnx.Module):
            yield node
    elif isinstance(node, list | tuple | dict):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _walk(child, seen)


def _children(node: nnx.Pytree) -> list[object]:
    # A list's elements are attributes by number: an inserted one lies behind the others.
    return list(node) if isinstance(node, nnx.List) else list(attributes(node).values())


def is_as_built(layer: nnx.Module) -> bool:
    """Whether a layer's attributes lie in its constructor's order.

    Split and merge, clone, view and jit sort them by name; ``jax.tree`` sorts parameters and
    settings apart from each other. A constructor's order descends at least twice
    (``test_every_layer_shows_whether_nnx_has_rebuilt_it``). What NNX has rebuilt, it has rebuilt
    whole, so a layer that is as built lies in a model whose order can be relied on.
    """
    return sum(later < earlier for earlier, later in pairwise(attributes(layer))) >= 2
