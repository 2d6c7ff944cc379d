"""What is recorded: two sides and how they are compared."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flaxstab import interop
from flaxstab._checks import check
from flaxstab._typing import DTypeLike, PyTree
from flaxstab.parity._carry import Weights
from flaxstab.parity._inputs import Layout, Values
from flaxstab.parity._lockstep import STEPS
from flaxstab.parity._optimizers import compare_optimizers
from flaxstab.parity._options import check_dtypes, check_options, checked_inputs
from flaxstab.parity._program import NNXProgram
from flaxstab.parity._record._baseline import Kind
from flaxstab.parity._record._pair import WatchedPair
from flaxstab.parity._recorded import RecordedSteps
from flaxstab.parity._replay import drawn_by
from flaxstab.parity._report import Report, Tolerance, check_tolerances
from flaxstab.parity._steps import TrainStep, ten_batches, train_both
from flaxstab.parity._torch_side import Rename, TorchSide
from flaxstab.parity._watched import StepWatch, Watched


class Subject(NamedTuple):
    """Two sides and how they are compared: the arguments of :func:`compare`, to be recorded.

    Attributes:
      flax_side: see ``compare``.
      torch_side: see ``compare``.
      inputs: a tuple of arrays for both sides; of two training steps a batch, or with ``steps``
        the batches.
      layout: see ``compare``.
      weights: see ``compare``.
      rename: see ``compare``.
      dtypes: see ``compare``.
      witness: see ``compare``.
      tolerances: see ``compare``.
      seed: see ``compare``.
      steps: of a training, for so many steps over the batches, as :func:`trajectory` does; 0 for
        what ``compare`` does.
      weights_file: where large weights come from; a baseline keeps this path and their hashes.
    """

    flax_side: object
    torch_side: PyTree
    inputs: Sequence[PyTree]
    layout: Layout = None
    weights: Weights = "torch"
    rename: Rename | None = None
    dtypes: Sequence[DTypeLike] = (np.float32,)
    witness: PyTree = None
    tolerances: Sequence[Tolerance] = ()
    seed: int = 0
    steps: int = 0
    weights_file: str = ""


class Run(NamedTuple):
    """What comparing a subject gave.

    Attributes:
      kind: of the subject.
      report: what was found.
      watched: all that both sides computed.
      inputs: by name.
      weights: that both started from, by PyTorch's names.
      buffers: names of those that are no parameters.
      optional: names of quantities that JAX's side may do without.
      draws: what the random layers drew.
    """

    kind: Kind
    report: Report
    watched: Watched
    inputs: Values
    weights: Values = MappingProxyType({})
    buffers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    draws: Values = MappingProxyType({})


def run(subject: Subject) -> Run:
    """Compares a subject's sides, and keeps what they computed.

    Raises:
      ValueError: as :func:`compare`.
    """
    check_options(subject.layout, subject.weights, subject.rename)
    check_dtypes(subject.dtypes)
    if isinstance(subject.flax_side, TrainStep):
        return _training(subject, subject.flax_side)
    arrays = checked_inputs(subject.inputs)
    inputs = {f"input {i}": a for i, a in enumerate(arrays)}
    allowed = check_tolerances(subject.tolerances)
    if isinstance(subject.flax_side, optax.GradientTransformation):
        watch = StepWatch(STEPS)
        report = compare_optimizers(
            subject.flax_side, subject.torch_side, arrays, dtypes=subject.dtypes,
            tolerances=allowed, witness=subject.witness, seed=subject.seed, watch=watch,
        )  # fmt: skip
        return Run("optimizer", report, watch.watched, inputs)
    pair = WatchedPair(
        subject.flax_side, subject.torch_side, arrays, layout=subject.layout,
        weights=subject.weights, rename=subject.rename, witness=subject.witness,
    )  # fmt: skip
    dtypes, seed = subject.dtypes, subject.seed
    report = pair.judge(arrays, dtypes=dtypes, tolerances=allowed, seed=seed)
    watched = pair.watch(arrays, dtypes=dtypes, seed=seed)
    buffers = tuple(sorted(pair.buffer_names()))
    draws = _draws(subject.flax_side)
    return Run("model", report, watched, inputs, pair.tensors(), buffers, draws=draws)


def _training(subject: Subject, flax_side: TrainStep) -> Run:
    if subject.steps:
        batches = [tuple(interop.to_numpy(a) for a in batch) for batch in subject.inputs]
    else:
        batches = ten_batches(checked_inputs(subject.inputs))
    steps, theirs = subject.steps or STEPS, subject.torch_side
    watch = StepWatch(steps)
    report = train_both(
        flax_side, theirs, batches, steps=steps, layout=subject.layout,
        weights=subject.weights, rename=subject.rename, dtypes=subject.dtypes,
        witness=subject.witness, tolerances=subject.tolerances, watch=watch,
    )  # fmt: skip
    inputs = _named_inputs(subject)
    recorded = isinstance(theirs, RecordedSteps)
    side = theirs.side if recorded else TorchSide(theirs.model, subject.rename)
    ours = watch.watched.jax.get("float64", {})
    optional = tuple(n for n in watch.watched.torch.get("float64", {}) if n not in ours)
    return Run(
        "training", report, watch.watched, inputs, side.tensors(),
        tuple(sorted(side.buffer_names())), optional, _draws(flax_side.model),
    )  # fmt: skip


def _named_inputs(subject: Subject) -> dict[str, np.ndarray]:
    if not subject.steps:
        return {f"input {i}": a for i, a in enumerate(checked_inputs(subject.inputs))}
    return {
        f"batch {n} input {i}": interop.to_numpy(a)
        for n, batch in enumerate(subject.inputs)
        for i, a in enumerate(batch)
    }


def _draws(model: object) -> Values:
    return drawn_by(NNXProgram(model).module) if isinstance(model, nnx.Module) else {}


def with_inputs(subject: Subject, inputs: Values) -> Subject:
    """Returns a subject with other inputs, as they were named by :func:`run`."""
    if not subject.steps:
        return subject._replace(inputs=tuple(inputs.values()))
    batches: dict[str, list[np.ndarray]] = {}
    for name, array in inputs.items():
        batches.setdefault(name.split(" input ")[0], []).append(array)
    return subject._replace(inputs=tuple(map(tuple, batches.values())))


def with_weights(subject: Subject, weights: Values) -> Subject:
    """Returns a subject whose PyTorch side starts from other weights; nothing given is changed.

    Flax's side takes them over when it is compared, unless ``weights`` says otherwise.

    Raises:
      ValueError: if they do not fit.
    """
    import torch

    side = subject.torch_side
    module = side.model if isinstance(side, TrainStep) else side
    if not weights or not isinstance(module, torch.nn.Module):
        return subject
    check(
        subject.weights == "torch",
        "weights of a baseline can be loaded where weights='torch'",
        weights=subject.weights,
        fix="Compare without the baseline, or carry PyTorch's weights.",
    )
    holder = TorchSide(module, subject.rename)
    holder.load(weights)
    loaded = holder.module
    return subject._replace(
        torch_side=side._replace(model=loaded) if isinstance(side, TrainStep) else loaded
    )


def names_of(dtypes: Sequence[DTypeLike]) -> tuple[str, ...]:
    """Returns the names of dtypes."""
    return tuple(jnp.dtype(kind).name for kind in dtypes)
