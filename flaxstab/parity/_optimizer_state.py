"""The state of optimizers by PyTorch's names, on either side."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxstab import optim
from flaxstab._typing import PyTree
from flaxstab.interop._optimizer_kinds import is_known, moments, nodes
from flaxstab.optim._paths import in_order, paths
from flaxstab.parity._inputs import is_float
from flaxstab.parity._torch_side import numpy_of

if TYPE_CHECKING:
    import torch


def jax_state(state: PyTree, named: Callable[[PyTree], Mapping[str, PyTree]]) -> dict[str, PyTree]:
    """Returns the arrays of an optax state by torch's names, such as ``'exp_avg weight'``.

    Args:
      state: an optax state of plain arrays.
      named: names the arrays of a tree like the parameters.
    """
    found: dict[str, PyTree] = {}
    for node in nodes(state):
        for key, tree in moments(node).items():
            found |= {f"{key} {name}": array for name, array in named(tree).items()}
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


def unnamed(state: PyTree) -> list[str]:
    """Returns where a state holds floating-point arrays that the table does not know.

    Args:
      state: an optax state of plain arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_known)
    unknown = [path for path, leaf in leaves if not is_known(leaf) and is_float(leaf)]
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
