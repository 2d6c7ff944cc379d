"""The order in which a model was put together, as far as NNX leaves it in the model."""

from collections.abc import Collection, Iterator

from flax import nnx

_FRESH = ("_pytree__state", "_pytree__nodes")  # what NNX gives a node before its constructor runs


def modules_of(model: nnx.Module) -> Iterator[nnx.Module]:
    """Yields every module once, children before parents, in the order of their assignment."""
    yield from (node for node in _nodes(model, set()) if isinstance(node, nnx.Module))


def _nodes(node: object, seen: set[int]) -> Iterator[nnx.Pytree]:
    if id(node) in seen:
        return
    if isinstance(node, nnx.Pytree):
        seen.add(id(node))
        for child in _children(node):
            yield from _nodes(child, seen)
        yield node
    elif isinstance(node, list | tuple | dict):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _nodes(child, seen)


def _children(node: nnx.Pytree) -> list[object]:
    # A list's elements are attributes by number, and lie in any order after a change.
    if isinstance(node, nnx.List):
        return list(node)
    return [value for name, value in vars(node).items() if name not in _FRESH]


def is_as_built(node: nnx.Pytree) -> bool:
    """Whether a node's attributes lie in the order in which they were first set.

    Split and merge, clone, view and jit rebuild a node with its attributes sorted by name, and
    ``jax.tree`` with parameters and settings sorted apart. NNX's own two attributes show it: they
    lie first, and in this order, only in a node whose constructor has run
    (``test_every_layer_shows_whether_nnx_has_rebuilt_it``).
    """
    return tuple(vars(node))[:2] == _FRESH


def out_of_order(model: nnx.Module, visited: Collection[nnx.Module]) -> nnx.Pytree | None:
    """Returns a node that NNX has rebuilt and that holds modules of a collection in several places.

    Args:
      model: where to look.
      visited: the modules whose order matters.
    """
    wanted = {id(module) for module in visited}

    def is_met(child: object) -> bool:
        return any(id(node) in wanted for node in _nodes(child, set()))

    for node in _nodes(model, set()):
        ordered = isinstance(node, nnx.List) or is_as_built(node)
        if not ordered and sum(map(is_met, _children(node))) > 1:
            return node
    return None
