"""Which parameters decay, decided by their role in the model and not by their rank."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from flax import nnx

from flaxstab._checks import check
from flaxstab.linear import Embed
from flaxstab.norms._kinds import NORMS
from flaxstab.optim._paths import (
    Parameter,
    Path,
    beside,
    chosen,
    given_for,
    like,
    parameters,
    table,
)

Mask: TypeAlias = Callable[[optax.Params], optax.Params] | optax.Params

_EMBEDDINGS = (Embed, nnx.Embed)
_NORM = re.compile("Norm(?![a-z])")  # LayerNorm2d, not NormalizedLinear
_DECAYING = ("weight", "embedding")
_BOOLEANS = (bool, np.bool_, np.ndarray, jax.Array)


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


def _shown(role: Role) -> str:
    doubtful = role.reason == "weight" and len(role.shape) < 2
    return "weight, of one axis: give it a role if it is none" if doubtful else role.reason


class DecayMask:
    """A function from a tree of parameters to a like tree of booleans: true where decay applies.

    It recognises parameters by path, so that one mask serves ``nnx.State``, pure dicts, nested
    trees and any part of them. Print it to see what decays.

    Attributes:
      roles: every parameter's role, by path.
    """

    def __init__(self, roles: Mapping[Path, Role]) -> None:
        self.roles = dict(roles)

    def __call__(self, params: optax.Params) -> optax.Params:
        """Returns booleans in a tree like ``params``.

        Raises:
          ValueError: if a leaf is not a parameter of the model that the mask was made for.
        """
        return like(params, lambda path: self.roles[path].decays, self.roles)

    def __str__(self) -> str:
        rows = [
            (path, role.shape, "yes" if role.decays else "no", _shown(role))
            for path, role in self.roles.items()
        ]
        return table(("parameter", "shape", "decays", "role"), *rows)


def decay_mask(
    model: nnx.Module, *, embeddings: bool = True, exempt: tuple[object, ...] = ()
) -> DecayMask:
    """Returns the mask that decays weights, and neither biases nor normalisation parameters.

    Decided by role, never by rank. Exempt are: every parameter of a normalisation layer,
    flaxstab's, NNX's or one in whose class name the word ``Norm`` occurs (``LayerNorm2d``), also
    in lists and dicts there; every ``scale``; every bias (also the
    two-dimensional ones of ``nnx.MultiHeadAttention``, ``bias_k`` and ``bias_v``); the slope of
    ``nnx.PReLU``, as PyTorch advises; and every ``nnx.Param`` with ``role`` metadata other than
    ``'weight'`` and ``'embedding'`` (class token, position embedding, layer scale). Stacked layers
    keep their roles. A shared parameter is exempt if one of its places says so. Low-rank factors
    decay. So do parameters of one axis without such a role; the table points them out.

    Args:
      model: the model; only its structure is read.
      embeddings: whether the tables of ``Embed`` layers decay.
      exempt: nnx filters of further parameters that do not decay, such as
        ``(nnx.PathContains("pos_embed"),)``. Or give the parameter a role where it is made:
        ``nnx.Param(value, role="position embedding")``.

    Returns:
      A mask for :func:`adamw`, ``optax.adamw`` and everything else in optax that takes one.

    Raises:
      ValueError: if a filter takes nothing.

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
    named = set().union(*chosen(model, exempt))
    decaying = _DECAYING if embeddings else _DECAYING[:1]
    roles = {}
    for parameter in parameters(model):
        reason = "exempt" if within(parameter.path, named) else role_of(parameter)
        roles[parameter.path] = Role(parameter.shape, reason in decaying, reason)
    return DecayMask(roles)


def role_of(parameter: Parameter) -> str:
    """Returns what a parameter is: 'weight', 'bias', 'normalisation', …, or its own metadata.

    A shared variable has a role at each of its places; one that exempts it comes first, then
    'embedding'.
    """
    roles = [_role_at(place) for place in (parameter, *parameter.others)]
    exempting = [role for role in roles if role not in _DECAYING]
    return exempting[0] if exempting else max(roles, key=_DECAYING.index)


def _role_at(parameter: Parameter) -> str:
    role = parameter.variable.get_metadata().get("role")
    owner, name = parameter.owner, parameter.name
    if role is not None:
        return str(role)
    if isinstance(owner, NORMS) or _NORM.search(type(owner).__name__):
        return "normalisation"
    if isinstance(owner, nnx.PReLU):
        return "slope"
    if isinstance(owner, _EMBEDDINGS):
        return "embedding"
    if {"bias", "biases"} & set(name.split("_")):
        return "bias"
    return "scale" if name == "scale" else "weight"


class Selection:
    """A function from a tree of parameters to a like tree of booleans: true where selected.

    Print it to see what is.

    Attributes:
      selected: whether each parameter is, by path.
    """

    def __init__(self, selected: Mapping[Path, bool]) -> None:
        self.selected = dict(selected)

    def __call__(self, params: optax.Params) -> optax.Params:
        """Returns booleans in a tree like ``params``.

        Raises:
          ValueError: if a leaf is not a parameter of the model that this was made for.
        """
        return like(params, lambda path: self.selected[path], self.selected)

    def __str__(self) -> str:
        rows = ((path, "yes" if chosen else "no") for path, chosen in self.selected.items())
        return table(("parameter", "selected"), *rows)


def select(model: nnx.Module, *filters: object) -> Selection:
    """Returns the mask that is true for what nnx filters take: for :func:`freeze` and the like.

    Args:
      model: the model; only its structure is read.
      *filters: nnx filters, such as ``nnx.PathContains("head")`` or ``nnx.LoRAParam``.

    Raises:
      ValueError: if one takes nothing that none before it takes.

    Example:
      >>> from flax import nnx
      >>> print(select(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.PathContains("bias")))
      parameter  selected
      bias       yes
      kernel     no
    """
    named = set().union(*chosen(model, filters))
    return Selection({p.path: within(p.path, named) for p in parameters(model)})


def within(path: Path, variables: set[Path]) -> bool:
    """Whether a leaf is one of these variables, or lies in one."""
    return any(path[:n] in variables for n in range(1, len(path) + 1))


def check_mask(mask: Mask | None) -> None:
    """Raises a ``ValueError`` for a bare boolean, which is what others make of a lost mask."""
    check(
        not isinstance(mask, bool | np.bool_ | np.ndarray | jax.Array),
        "mask must be a function or a tree of booleans, not a bare boolean",
        fix="Pass mask=decay_mask(model); with optax.inject_hyperparams name it in "
        "static_args=('mask',).",
        mask=mask,
    )


def flags(mask: Mask, params: optax.Params) -> list[bool]:
    """Returns one Python boolean per parameter, in their order.

    Raises:
      ValueError: if the mask does not fit; it names the leaves.
    """
    rule = "mask must have one boolean per parameter, at the parameter's place"
    fix = "Pass a function such as decay_mask(model): it fits every form of the tree."
    if not jax.tree.leaves(params):  # also what optax.tree.map_params puts in their place
        return []
    found = beside(given_for(mask, params), params, rule, fix)
    odd = sorted({str(flag) for flag in found if not isinstance(flag, _BOOLEANS) or np.ndim(flag)})
    check(not odd, rule, fix=fix, mask=odd)
    return [bool(flag) for flag in found]
