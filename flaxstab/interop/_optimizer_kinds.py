"""What optax and torch.optim call the same state: one table."""

from collections.abc import Iterator

import jax
import optax

from flaxstab import optim
from flaxstab._typing import PyTree

_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
KINDS: dict[type, dict[str, str]] = {
    optim.AdamState: _ADAM,
    optim.SgdState: {"trace": "momentum_buffer"},
    optax.ScaleByAdamState: {name: _ADAM[name] for name in ("mu", "nu")},
    optax.ScaleByAmsgradState: _ADAM,
    optax.TraceState: {"trace": "momentum_buffer"},
    optax.ScaleByRmsState: {"nu": "square_avg"},
    optax.ScaleByRStdDevState: {"mu": "grad_avg", "nu": "square_avg"},
    optax.ScaleByRssState: {"sum_of_squares": "sum"},
}
"""The fields of optax's states that hold a tree like the parameters, and torch's names for them."""


def is_known(node: object) -> bool:
    """Whether a part of a state is in the table."""
    return isinstance(node, tuple(KINDS))


def nodes(state: PyTree) -> Iterator[PyTree]:
    """Yields the parts of an optax state that are in the table."""
    yield from (node for node in jax.tree.leaves(state, is_leaf=is_known) if is_known(node))


def moments(node: PyTree) -> dict[str, PyTree]:
    """Returns a part's trees by torch's names; those that it does without are left out."""
    fields = {key: getattr(node, field) for field, key in KINDS[type(node)].items()}
    return {key: tree for key, tree in fields.items() if tree is not None}
