"""How far a Flax model and its optimizer are from their PyTorch twins."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from flaxstab import interop, optim
from flaxstab.parity._optimizer_state import steps_like_moments

if TYPE_CHECKING:
    import torch


class Distance(NamedTuple):
    """The largest relative difference between tensors of the same name.

    Attributes:
      value: the largest difference, divided by the largest element of its tensor.
      name: the tensor it was found in; '' if there is none.
    """

    value: float
    name: str


def distance(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *, floor: float = 0.0
) -> Distance:
    """Returns the largest relative difference between two sets of tensors.

    Args:
      ours: arrays by name.
      theirs: arrays of the same names and shapes.
      floor: the size below which a tensor counts as this large, so that one that is all but 0
        does not make rounding look like a difference.

    Raises:
      ValueError: if names or shapes differ.
    """
    if ours.keys() != theirs.keys():
        apart = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(f"both sides must hold the same tensors, got {apart} on one side only.")
    worst = Distance(0.0, "")
    for name, array in theirs.items():
        if ours[name].shape != array.shape:
            raise ValueError(
                f"tensors must have equal shapes, got {name} {ours[name].shape} and {array.shape}."
            )
        a, b = (np.asarray(side, np.float64) for side in (ours[name], array))
        gap, size = np.max(np.abs(a - b), initial=0), np.max(np.abs(b), initial=floor)
        value = float(gap / size) if size else (np.inf if gap else 0.0)
        # NaN compares as neither larger nor smaller: it must not hide, nor be hidden.
        if not (value <= worst.value or np.isnan(worst.value)):
            worst = Distance(value, name)
    return worst


def model_distances(
    flax_model: nnx.Module, torch_model: "torch.nn.Module", *, floor: float = 0.0
) -> tuple[Distance, Distance]:
    """Returns how far parameters are apart, and how far running statistics.

    Args:
      flax_model: a model.
      torch_model: its twin, with the same names.
      floor: of the parameters' sizes, see :func:`distance`.
    """
    ours = interop.state_dict(flax_model, flattened=interop.as_is(flax_model))
    named = dict(torch_model.named_parameters())
    theirs = {name: tensor.detach().numpy() for name, tensor in torch_model.state_dict().items()}
    statistics = [name for name in theirs if name not in named]
    if ours.keys() != theirs.keys():
        distance(ours, theirs)
    params = distance({n: ours[n] for n in named}, {n: theirs[n] for n in named}, floor=floor)
    return params, distance({n: ours[n] for n in statistics}, {n: theirs[n] for n in statistics})


def adam_distance(
    flax_model: nnx.Module,
    state: optax.OptState,
    torch_model: "torch.nn.Module",
    optimizer: "torch.optim.Optimizer",
) -> Distance:
    """Returns how far the moments, their maxima and step counts of Adam or AdamW are apart.

    Args:
      flax_model: the model.
      state: optax state that holds ``mu``, ``nu`` and ``count``, such as ``optimizer.opt_state``.
      torch_model: the model's twin.
      optimizer: its ``torch.optim.Adam`` or ``AdamW``.
    """
    found = _adam_state(state)
    names = {parameter: name for name, parameter in torch_model.named_parameters()}
    ours, theirs = {}, {}
    moments = {"exp_avg": found.mu, "exp_avg_sq": found.nu, "step": steps_like_moments(found)}
    if getattr(found, "nu_max", None) is not None:
        moments["max_exp_avg_sq"] = found.nu_max
    for key, tree in moments.items():
        model = nnx.clone(flax_model)
        nnx.update(model, tree)
        named = interop.state_dict(model, flattened=interop.as_is(model))
        for parameter, entry in optimizer.state.items():
            array = named[names[parameter]]
            ours[f"{key} {names[parameter]}"] = array.max() if key == "step" else array
            theirs[f"{key} {names[parameter]}"] = entry[key].numpy()
    return distance(ours, theirs)


def _adam_state(state: optax.OptState) -> optim.AdamState | optax.ScaleByAdamState:
    kinds = (optim.AdamState, optax.ScaleByAdamState, optax.ScaleByAmsgradState)
    pure = nnx.as_pure(state)
    nodes = jax.tree.leaves(pure, is_leaf=lambda node: isinstance(node, kinds))
    found = [node for node in nodes if isinstance(node, kinds)]
    if len(found) != 1:
        raise ValueError(f"state must hold one Adam state, got {len(found)}.")
    return found[0]
