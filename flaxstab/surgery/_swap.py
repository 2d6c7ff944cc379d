"""Copies a model without its arrays and swaps the normalisation layers of the copy."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import numpy as np
from flax import nnx

from flaxstab import norms
from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.norms._kinds import NORMS
from flaxstab.surgery._walk import check_model

_Path: TypeAlias = tuple[object, ...]
_Make: TypeAlias = Callable[[nnx.Module], nnx.Module | None]


def swapped(model: nnx.Module, make: _Make) -> nnx.Module:
    """Returns a copy of a model, with the same arrays, whose norms a function has replaced.

    Args:
      model: stays as it is.
      make: from a norm of the copy to what takes its place; ``None`` leaves it.
    """
    check_model(model)
    # In tree mode, too, a layer that is held twice is one.
    copy = nnx.clone(model, graph=True)
    for _, node in nnx.iter_graph(copy, graph=True):
        # JAX's arrays never change; NumPy's do, under variable[...] = value.
        if isinstance(node, nnx.Variable) and isinstance(node.get_value(), np.ndarray):
            node.set_value(node.get_value().copy())
    root = _Swap(make).of((), copy)
    return root if isinstance(root, nnx.Module) else copy


class _Swap:
    """Walks a model and remembers what it has met, so that shared nodes stay shared."""

    def __init__(self, make: _Make) -> None:
        self.make = make
        # With the nodes themselves: the id of one that is gone could be another's.
        self.met: dict[int, tuple[object, object]] = {}

    def of(self, path: _Path, node: object) -> object:
        """Returns what takes a node's place: mostly the node itself."""
        if id(node) in self.met:
            return self.met[id(node)][1]
        if isinstance(node, NORMS):
            self.met[id(node)] = node, _replacement(path, node, self.make)
            return self.met[id(node)][1]
        if isinstance(node, nnx.Pytree):
            self.met[id(node)] = node, node
            for name, value in list(vars(node).items()):
                new = self.of((*path, name), value)
                if new is not value:
                    setattr(node, name, nnx.data(new))
            return node
        return self._container(path, node)

    def _container(self, path: _Path, node: object) -> object:
        """Rebuilds a list, tuple, dict or other pytree if something in it is replaced."""
        if isinstance(node, nnx.Variable):
            return node
        leaves, tree = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        if not leaves or leaves[0][1] is node:
            return node
        new = [self.of((*path, jax.tree_util.keystr(at, simple=True)), v) for at, v in leaves]
        same = all(a is b for a, (_, b) in zip(new, leaves, strict=True))
        return node if same else jax.tree_util.tree_unflatten(tree, new)


def _replacement(path: _Path, layer: nnx.Module, make: _Make) -> nnx.Module:
    name = f"{'.'.join(map(str, path))!r} {type(layer).__name__}"
    stack = _stack(layer)
    try:
        new: object = make(layer)
    except ValueError as reason:
        raise ValueError(f"{name}: {reason}") from reason
    if new is None:
        return layer
    if not isinstance(new, nnx.Module):
        raise ValueError(
            f"make must return an nnx.Module or None, got {type(new).__name__} for {name}."
        )
    for shape in _shapes(new):
        check(
            shape[: len(stack)] == stack,
            f"{name} is a stack of layers {stack}: every array in its place must begin with "
            "those axes",
            fix="Move or copy the layer's arrays into the new layer, or build it with nnx.vmap.",
            shape=shape,
        )
    return new


def _stack(layer: nnx.Module) -> Shape:
    """Returns the leading axes that ``nnx.vmap`` or ``nnx.scan`` has given a norm's arrays."""
    rank = 1
    if isinstance(layer, norms.LayerNorm | norms.RMSNorm):
        rank = len(layer.normalized_shape)
    held = (vars(layer).get(name) for name in ("scale", "bias", "mean", "var"))
    shapes = (np.shape(v.get_value()) for v in held if isinstance(v, nnx.Variable))
    return next((shape[: len(shape) - rank] for shape in shapes), ())


def _shapes(module: nnx.Module) -> Iterator[Shape]:
    for _, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, nnx.Variable):
            yield from (np.shape(leaf) for leaf in jax.tree.leaves(node.get_value()))
