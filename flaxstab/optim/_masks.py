"""Which parameters decay, decided by their role in the model and not by their rank."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax
from flax import nnx

from flaxstab.norms._kinds import NORMS


class Role(NamedTuple):
    """What weight decay needs to know of one parameter.

    Attributes:
      shape: the parameter's shape.
      decays: whether weight decay applies.
      reason: the role that decides it.
    """

    shape: tuple[int, ...]
    decays: bool
    reason: str


class DecayMask:
    """A function from a tree of parameters to a like tree of booleans: true where decay applies.

    It recognises parameters by path, so that one mask serves ``nnx.State``, pure dicts, nested
    trees and any part of them. Print it to see what decays.

    Attributes:
      roles: every parameter's role, by path.
    """

    def __init__(self, roles: Mapping[tuple[str, ...], Role]) -> None:
        self.roles = dict(roles)

    def __call__(self, params: optax.Params) -> optax.Params:
        """Returns booleans in a tree like ``params``.

        Raises:
          ValueError: if a leaf is not a parameter of the model that the mask was made for.
        """
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        return jax.tree.unflatten(treedef, [self._role(path).decays for path, _ in paths])

    def _role(self, path: tuple[object, ...]) -> Role:
        names = path_names(path)
        for known in (names, unwrapped(names)):
            if known in self.roles:
                return self.roles[known]
        raise ValueError(
            "the mask must be made for the model whose parameters it gets, "
            f"got leaf={'.'.join(names)!r}. "
            f"Known parameters: {', '.join('.'.join(known) for known in self.roles)}. "
            "With optax.inject_hyperparams name the mask in static_args=('mask',)."
        )

    def __str__(self) -> str:
        rows = [("parameter", "shape", "decays", "role")]
        rows += [
            (".".join(path), str(role.shape), "yes" if role.decays else "no", role.reason)
            for path, role in self.roles.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def decay_mask(model: nnx.Module) -> DecayMask:
    """Returns the mask that decays weights, and neither biases nor normalisation parameters.

    Decided by role: every parameter of a normalisation layer, every ``bias`` (also the
    two-dimensional ones of ``nnx.MultiHeadAttention``), and every ``nnx.Param`` with ``role``
    metadata other than ``'weight'`` (class token, position embedding, layer scale) is exempt;
    stacked layers keep their roles. Give a parameter of your own ``nnx.Param(value, role='…')``
    to exempt it.

    Args:
      model: the model; only its structure is read.

    Returns:
      A mask for :func:`adamw`, ``optax.adamw`` and everything else in optax that takes one.

    Example:
      >>> from flax import nnx
      >>> print(decay_mask(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
      parameter  shape   decays  role
      bias       (3,)    no      bias
      kernel     (2, 3)  yes     weight

    Reference:
      T. He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks",
      2018, arXiv:1812.01187 (section 3.1, "no bias decay").
    """
    modules = dict(nnx.iter_modules(model))
    roles = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        owner = next(modules[path[:n]] for n in range(len(path) - 1, -1, -1) if path[:n] in modules)
        reason = _reason(owner, str(path[-1]), variable)
        names = tuple(str(name) for name in path)
        roles[names] = Role(tuple(variable.shape), reason == "weight", reason)
    return DecayMask(roles)


def _reason(owner: nnx.Module, name: str, variable: nnx.Variable[jax.Array]) -> str:
    role = variable.get_metadata().get("role")
    if role is not None:
        return str(role)
    if isinstance(owner, NORMS):
        return "normalisation"
    return "bias" if name.startswith("bias") or name.endswith("_bias") else "weight"


def path_names(path: tuple[object, ...]) -> tuple[str, ...]:
    """Returns the names along a JAX key path."""
    return tuple(_name(entry) for entry in path)


def unwrapped(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a path without the '.value' at which a State's leaf lies below its variable."""
    return names[:-1] if names[-1:] == ("value",) else names


def _name(entry: object) -> str:
    """Returns the name in one entry of a JAX key path."""
    match entry:
        case jax.tree_util.DictKey(key=key) | jax.tree_util.FlattenedIndexKey(key=key):
            return str(key)
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
        case jax.tree_util.GetAttrKey(name=name):
            return name
    return str(entry)
