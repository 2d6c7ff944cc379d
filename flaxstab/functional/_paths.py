"""Leaves by their path in the model, which every form of a tree of parameters shares."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._typing import PyTree

Names: TypeAlias = tuple[str, ...]


def by_path(tree: PyTree) -> dict[Names, PyTree]:
    """Returns a tree's leaves by path, ``None`` among them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=absent)
    return {path_names(path): leaf for path, leaf in leaves}


def path_names(path: tuple[object, ...]) -> Names:
    """Returns the names along a JAX key path, without the step from a variable to its value."""
    steps = [i for i, entry in enumerate(path) if entry == jax.tree_util.GetAttrKey("value")]
    return tuple(name_of(entry) for i, entry in enumerate(path) if i not in steps[-1:])


def absent(leaf: object) -> bool:
    """Whether a leaf is ``None``, which JAX takes for no leaf."""
    return leaf is None


def is_flag(leaf: object) -> bool:
    """Whether a leaf of a mask is one boolean whose value is known: Python's or an array's."""
    if isinstance(leaf, np.generic | np.ndarray | jax.Array):
        is_boolean = leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.bool_)
        return is_boolean and not isinstance(leaf, jax.core.Tracer)
    return isinstance(leaf, bool)


def name_of(entry: object) -> str:
    """Returns the name of one step of a JAX key path."""
    match entry:
        case jax.tree_util.DictKey(key=key) | jax.tree_util.FlattenedIndexKey(key=key):
            return str(key)
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
        case jax.tree_util.GetAttrKey(name=name):
            return name
    return str(entry)
