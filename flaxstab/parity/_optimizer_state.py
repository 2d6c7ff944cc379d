"""What optax and torch.optim call the same state: one table."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxstab import optim
from flaxstab._typing import PyTree
from flaxstab.optim._paths import in_order, paths
from flaxstab.parity._inputs import is_float
from flaxstab.parity._torch_side import numpy_of

if TYPE_CHECKING:
    import torch

_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
_KINDS: dict[type, dict[str, str]] = {
    optim.AdamState: _ADAM,
    optim.SgdState: {"trace": "momentum_buffer"},
    optax.ScaleByAdamState: {name: _ADAM[name] for name in ("mu", "nu")},
    optax.ScaleByAmsgradState: _ADAM,
    optax.TraceState: {"trace": "momentum_buffer"},
    optax.ScaleByRmsState: {"nu": "square_avg"},
    optax.ScaleByRStdDevState: {"mu": "grad_avg", "nu": "square_avg"},
    optax.ScaleByRssState: {"sum_of_squares": "sum"},
}


def jax_state(state: PyTree, named: Callable[[PyTree], Mapping[str, PyTree]]) -> dict[str, PyTree]:
    """Returns the arrays of an optax state by torch's names, such as ``'exp_avg weight'``.

    Args:
      state: an optax state of plain arrays.
      named: names the arrays of a tree like the parameters.
    """
    found: dict[str, PyTree] = {}
    for node in _nodes(state):
        for field, key in _KINDS[type(node)].items():
            if getattr(node, field) is not None:
                names = named(getattr(node, field))
                found |= {f"{key} {name}": array for name, array in names.items()}
        if {"count", "mu"} <= {*node._fields}:  # torch's SGD counts no steps
            steps = named(steps_like_moments(node))
            found |= {f"step {name}": jnp.max(array) for name, array in steps.items()}
    return found


def steps_like_moments(node: optim.AdamState | optax.ScaleByAdamState) -> PyTree:
    """Returns every parameter's own step number, in arrays of the shapes of its moments."""
    leaves, treedef = jax.tree.flatten(node.mu)
    skipped = np.zeros(len(leaves), int)
    if isinstance(node, optim.AdamState) and node.skipped is not None:
        skipped = np.asarray(node.skipped)[in_order(paths(node.mu))]
    steps = [jnp.full(a.shape, node.count - n) for a, n in zip(leaves, skipped, strict=True)]
    return jax.tree.unflatten(treedef, steps)


def _nodes(state: PyTree) -> Iterator[PyTree]:
    """Yields the states that the table knows."""
    kinds = tuple(_KINDS)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    yield from (node for node in nodes if isinstance(node, kinds))


def unnamed(state: PyTree) -> list[str]:
    """Returns where a state holds floating-point arrays that the table does not know.

    Args:
      state: an optax state of plain arrays.
    """
    kinds = tuple(_KINDS)
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda n: isinstance(n, kinds))
    unknown = [path for path, leaf in leaves if not isinstance(leaf, kinds) and is_float(leaf)]
    return [f"optimizer state{jax.tree_util.keystr(path)}" for path in unknown]


def torch_state(
    optimizer: "torch.optim.Optimizer", names: "Mapping[torch.nn.Parameter, str]"
) -> dict[str, np.ndarray]:
    """Returns an optimizer's tensors by name, such as ``'exp_avg weight'`` and ``'step weight'``.

    Args:
      optimizer: after at least one step.
      names: of its parameters.
    """
    import torch

    return {
        f"{key} {names[parameter]}": numpy_of(torch.as_tensor(value)).copy()
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
        if value is not None
    }
