"""Carries PyTorch's weights into a model and compares both, in one call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import Layout
from flaxstab.parity._models import Pair
from flaxstab.parity._options import check_dtypes, check_options, checked_inputs
from flaxstab.parity._report import Report, Tolerance, check_tolerances
from flaxstab.parity._torch_side import Rename

if TYPE_CHECKING:
    import torch


def verify(
    flax_model: nnx.Module,
    torch_model: "torch.nn.Module",
    *inputs: np.ndarray,
    layout: Layout = None,
    rename: Rename | None = None,
    dtypes: Sequence[DTypeLike] = (np.float32,),
    tolerances: Sequence[Tolerance] = (),
    seed: int = 0,
) -> Report:
    """Loads a PyTorch model's weights into a Flax model, and says whether both are one function.

    One call behind a port: :func:`flaxstab.interop.load_state_dict` and :func:`compare`, whose
    arguments these are. The model keeps what it got, also where the report says that it differs:
    that is what one looks into next (:func:`locate`).

    Args:
      flax_model: gets PyTorch's parameters and statistics, in place, all or nothing. Its modes and
        its random streams stay as they are.
      torch_model: is not changed.
      *inputs: arrays for both sides, features last.
      layout: as of :func:`compare`.
      rename: from a name in PyTorch's state_dict to the name of the same tensor in Flax.
      dtypes: the lower precisions to judge.
      tolerances: bounds that you widen, each with its reason.
      seed: of the cotangents.

    Returns:
      The report of the comparison.

    Raises:
      ValueError: if a side is no module, the weights do not fit or a side cannot run.
        ``flax_model`` is then unchanged.

    Example:
      >>> import numpy, torch
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> ours, theirs = linear.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2)
      >>> verify(ours, theirs, numpy.linspace(-1, 1, 12).reshape(4, 3)).passed
      True
      >>> bool((ours.bias[...] == theirs.bias.detach().numpy()).all())
      True
    """
    import torch

    fix = "For functions and training steps use parity.compare."
    is_flax, is_torch = isinstance(flax_model, nnx.Module), isinstance(torch_model, torch.nn.Module)
    kind = type(flax_model).__name__
    check(is_flax, "flax_model must be an nnx.Module", fix=fix, flax_model=kind)
    kind = type(torch_model).__name__
    check(is_torch, "torch_model must be a torch.nn.Module", fix=fix, torch_model=kind)
    check_options(layout, "torch", rename)
    check_dtypes(dtypes)
    arrays, allowed = checked_inputs(inputs), check_tolerances(tolerances)
    pair = Pair(flax_model, torch_model, arrays, layout=layout, rename=rename)
    report = pair.judge(arrays, dtypes=dtypes, tolerances=allowed, seed=seed)
    # Last: nothing is changed by a call that fails.
    carried, _ = pair.sides()
    nnx.update(flax_model, nnx.state(cast(nnx.Module, carried), nnx.Not(nnx.RngState)))
    return report
