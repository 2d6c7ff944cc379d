"""The one way to compare: models, functions, optimizers and training steps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import optax

from flaxstab import interop
from flaxstab._checks import check
from flaxstab._typing import DTypeLike, PyTree
from flaxstab.parity._carry import Weights
from flaxstab.parity._inputs import Layout
from flaxstab.parity._models import Pair
from flaxstab.parity._optimizers import compare_optimizers
from flaxstab.parity._options import check_dtypes, check_options
from flaxstab.parity._report import Report, Tolerance, check_tolerances
from flaxstab.parity._steps import TrainStep, ten_batches, trajectory
from flaxstab.parity._torch_side import Rename

if TYPE_CHECKING:
    import torch


def compare(
    flax_side: object,
    torch_side: "torch.nn.Module | Callable[..., PyTree] | TrainStep",
    *inputs: np.ndarray,
    layout: Layout = None,
    weights: Weights = "torch",
    rename: Rename | None = None,
    dtypes: Sequence[DTypeLike] = (np.float32,),
    witness: "torch.nn.Module | Callable[..., PyTree] | TrainStep | None" = None,
    tolerances: Sequence[Tolerance] = (),
    seed: int = 0,
) -> Report:
    """Compares a model, a function, an optimizer or a training step with its PyTorch counterpart.

    *Models and functions.* Both sides run in training mode on the same inputs. Compared are the
    outputs, input and parameter gradients for random cotangents, every buffer after 1, 2 and 10
    steps, and evaluation after them: first in float64, where both must agree to 1e-12 of each
    quantity's magnitude, then at each of ``dtypes``, where JAX's error against its own float64
    run may be twice torch's against its own plus 2 eps of the quantity's sensitivity. Shapes,
    dtypes, and the places of NaN and infinity must agree. Weights and statistics are rounded to
    the dtype first; layers with running statistics keep float32 on both sides. Dropout layers
    drop the same elements on both sides (:func:`replayed`).

    *Optimizers.* An optax transformation and a function that makes a torch optimizer of a list
    of parameters (``lambda ps: torch.optim.AdamW(ps, lr=1e-3)``), or that changes ``p.grad`` in
    place (``lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1.0)``). ``inputs`` are the initial
    parameters; updates, parameters and optimizer state are compared after each of 10 steps with
    gradients of many sizes. A hook joins both: ``register_step_pre_hook``.

    *Training steps.* Two :class:`TrainStep`; ``inputs`` are a batch. Loss, parameters, updates,
    buffers and optimizer state are compared after each of 10 steps; :func:`trajectory` does more.

    Args:
      flax_side: an ``nnx.Module``, a :class:`Linen`, a function of arrays, an
        ``optax.GradientTransformation`` or a :class:`TrainStep`.
      torch_side: its counterpart. Neither side is changed.
      *inputs: arrays for both sides, features last; floating-point ones are differentiated.
      layout: ``'image'`` moves the last axis to 1 for torch's inputs, and its outputs and input
        gradients back; ``None`` gives both sides the same arrays. Never guessed.
      weights: the side whose parameters and statistics both get, ``'torch'`` or ``'flax'``;
        ``None`` leaves each side its own.
      rename: from a name in torch's state_dict to the name of the same tensor in Flax.
      dtypes: the lower precisions to judge, of float32, bfloat16 and float16.
      witness: a third implementation, given as ``torch_side`` is, such as the plain formula. It
        is asked where semantics differ: the side that it contradicts is named.
      tolerances: bounds that you widen, each with its reason; they show in the report.
      seed: of the cotangents, or of an optimizer's gradients.

    Returns:
      One finding per quantity and precision, with the side at fault where it can be told.

    Raises:
      ValueError: if the weights do not fit, a side cannot run, both return different structures
        or shapes, or a dropout layer has no counterpart. The message names the place.

    Example:
      >>> from flaxstab import functional
      >>> import numpy, torch
      >>> report = compare(functional.gelu, torch.nn.functional.gelu, numpy.linspace(-3.0, 3.0, 7))
      >>> report.passed, str(report.verdict)
      (True, 'agree')

    Reference:
      P. Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, for what is
      kept in float32; D. S. Parker, "Monte Carlo Arithmetic", 1997, for the magnitude.
    """
    check_options(layout, weights, rename)
    check_dtypes(dtypes)
    arrays, allowed = checked_inputs(inputs), check_tolerances(tolerances)
    if isinstance(flax_side, TrainStep):
        both = _both_steps(torch_side, witness)
        return trajectory(
            flax_side, both[0], ten_batches(arrays), steps=10, layout=layout, weights=weights,
            rename=rename, dtypes=dtypes, witness=both[1], tolerances=allowed,
        )  # fmt: skip
    if isinstance(flax_side, optax.GradientTransformation):
        return compare_optimizers(
            flax_side, torch_side, arrays,
            dtypes=dtypes, tolerances=allowed, witness=witness, seed=seed,
        )  # fmt: skip
    pair = Pair(
        flax_side, torch_side, arrays,
        layout=layout, weights=weights, rename=rename, witness=witness,
    )  # fmt: skip
    return pair.judge(arrays, dtypes=dtypes, tolerances=allowed, seed=seed)


def checked_inputs(inputs: Sequence[object]) -> tuple[np.ndarray, ...]:
    """Returns inputs as NumPy's arrays.

    Raises:
      ValueError: if one is complex.
    """
    arrays = tuple(interop.to_numpy(a) for a in inputs)
    kinds = [str(a.dtype) for a in arrays]
    fix = "Compare real and imaginary parts, as functions of both."
    check(
        not any("complex" in kind for kind in kinds), "inputs must be real", fix=fix, inputs=kinds
    )
    return arrays


def _both_steps(torch_side: object, witness: object) -> tuple[TrainStep, TrainStep | None]:
    """Returns PyTorch's training step and the witness, if they are training steps, too."""
    if not isinstance(torch_side, TrainStep) or not isinstance(witness, TrainStep | None):
        raise ValueError(
            "torch_side and witness of a TrainStep must be one, too, got "
            f"{type(torch_side).__name__} and {type(witness).__name__}. Pass "
            "parity.TrainStep(module, make_optimizer, step)."
        )
    return torch_side, witness
