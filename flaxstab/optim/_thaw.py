"""The state of an optimizer for more parameters than the state that there is."""

import jax
import jax.numpy as jnp
import optax

from flaxstab._checks import check
from flaxstab._typing import Array, PyTree
from flaxstab.functional._paths import by_path
from flaxstab.optim._adam import AdamState
from flaxstab.optim._paths import in_order, paths
from flaxstab.optim._sgd import SgdState

_KINDS = (AdamState, SgdState)
_MOMENTS = ("mu", "nu", "nu_max", "trace")


def thaw(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> optax.OptState:
    """Returns the state of ``tx`` for all of ``params``, with what another state knows of some.

    For an optimizer that was made by :func:`freeze` and goes on with fewer parameters frozen:
    moments and counts stay, parameters that had none begin with moments of 0, as PyTorch's do. If
    ``tx`` has ``own_steps``, they also begin at their first step; otherwise at the common one, and
    their first updates are smaller than PyTorch's.

    Args:
      tx: the optimizer to go on with.
      state: that of the same optimizer, around which another mask was frozen.
      params: all parameters, in the form that ``tx`` will get.

    Raises:
      ValueError: if the states are not of the same kinds, or one holds moments of a parameter that
        ``params`` lacks or whose shape differs.

    Example:
      >>> import jax.numpy as jnp
      >>> from flaxstab.optim import adamw, freeze
      >>> params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
      >>> before = freeze(adamw(0.1), {"backbone": True, "head": False})
      >>> _, state = before.update(params, before.init(params), params)
      >>> thawed = thaw(adamw(0.1, own_steps=True), state, params)
      >>> int(thawed.count), thawed.skipped.tolist(), thawed.mu["backbone"].tolist()
      (1, [1, 0], [0.0, 0.0])
    """
    fresh, found = (_nodes(tree) for tree in (tx.init(params), state))
    kinds = [[type(node).__name__ for node in nodes] for nodes, _ in (fresh, found)]
    check(kinds[0] == kinds[1], "the states must be of the same kinds", fix="", of=kinds)
    made = [_thawed(new, old) for new, old in zip(fresh[0], found[0], strict=True)]
    return jax.tree.unflatten(fresh[1], made)


def _nodes(state: optax.OptState) -> tuple[list[PyTree], jax.tree_util.PyTreeDef]:
    return jax.tree.flatten(state, is_leaf=lambda node: isinstance(node, _KINDS))


def _thawed(new: PyTree, old: PyTree) -> PyTree:
    if not isinstance(new, _KINDS):
        return old
    kept = {name: _filled(getattr(new, name), getattr(old, name)) for name in _named(new)}
    if new.skipped is not None:
        kept["skipped"] = _counts(new, old)
    return new._replace(count=old.count, **kept)


def _named(state: AdamState | SgdState) -> list[str]:
    return [name for name in _MOMENTS if getattr(state, name, None) is not None]


def _filled(new: optax.Updates, old: optax.Updates) -> optax.Updates:
    """Returns the moments that there are, and new ones for the other parameters."""
    known, wanted = by_path(old), by_path(new)
    odd = sorted(
        ".".join(path)
        for path, leaf in known.items()
        if path not in wanted or leaf.shape != wanted[path].shape
    )
    check(not odd, "the parameters must have those of the state, in their shapes", fix="", odd=odd)
    leaves = [known.get(path, leaf) for path, leaf in wanted.items()]
    cast = [jnp.asarray(a, b.dtype) for a, b in zip(leaves, wanted.values(), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(new), cast)


def _counts(new: PyTree, old: PyTree) -> Array:
    """Returns how many updates every parameter has sat out, all of them if it is new."""
    names = _named(new)
    if not names:
        return new.skipped
    wanted, known = paths(getattr(new, names[0])), paths(getattr(old, names[0]))
    places, before = in_order(wanted), dict(zip(known, in_order(known), strict=True))
    skipped = jnp.zeros(max(1, len(known)), jnp.int32) if old.skipped is None else old.skipped
    counts = new.skipped + old.count
    for place, path in zip(places, wanted, strict=True):
        if path in before:
            counts = counts.at[place].set(skipped[before[path]])
    return counts
