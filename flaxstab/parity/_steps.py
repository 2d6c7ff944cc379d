"""Whole training steps of a Flax model and its PyTorch twin, side by side."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._checks import check, check_positive
from flaxstab._typing import Array, DTypeLike, PyTree
from flaxstab.parity._carry import Weights, carry
from flaxstab.parity._flax_side import stored_as
from flaxstab.parity._inputs import Layout, Values, channels_first, growth, is_float
from flaxstab.parity._lockstep import STEPS, Batch, Watch, lockstep, updates
from flaxstab.parity._optimizer_state import jax_state, torch_state, unnamed
from flaxstab.parity._place import located
from flaxstab.parity._precision import Precision, jax_at
from flaxstab.parity._program import NNXProgram
from flaxstab.parity._recorded import RecordedSteps
from flaxstab.parity._replay import Draws, replayed
from flaxstab.parity._report import Report, Tolerance, check_tolerances
from flaxstab.parity._torch_side import (
    Rename,
    TorchSide,
    at_precision,
    numpy_of,
    torch_dtype,
    torch_tensor,
)

if TYPE_CHECKING:
    import torch


class TrainStep(NamedTuple):
    """A model, its optimizer and one training step, in either framework.

    Attributes:
      model: an ``nnx.Module`` or a ``torch.nn.Module``; it is copied, never changed.
      optimizer: makes the optimizer of a model: ``lambda m: nnx.Optimizer(m, tx, wrt=nnx.Param)``
        or ``lambda m: torch.optim.AdamW(m.parameters())``. For torch it may return a tuple that
        holds the optimizer and, say, a learning-rate scheduler.
      step: ``step(model, optimizer, *batch)`` does one whole step, with what ``optimizer``
        returned, and returns the loss.
    """

    model: PyTree
    optimizer: Callable[..., PyTree]
    step: Callable[..., PyTree]


def trajectory(
    flax_side: TrainStep,
    torch_side: TrainStep,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    steps: int,
    layout: Layout = None,
    weights: Weights = "torch",
    rename: Rename | None = None,
    dtypes: Sequence[DTypeLike] = (),
    witness: TrainStep | None = None,
    tolerances: Sequence[Tolerance] = (),
) -> Report:
    """Trains a pair of models side by side and compares every tensor after every step.

    Loss, parameters, updates, buffers and optimizer state (``exp_avg``, ``momentum_buffer``,
    step counts, ...). In float64 both sides must agree to 1e-10 of each tensor's size for as long
    as training goes, in the first steps to 1e-12 per step. At ``dtypes``, JAX's side must stay
    twice PyTorch's own distance from its float64 run plus one eps per step, or within what float64
    runs show whose weights and inputs are moved by one eps and whose every operation is rounded
    to that precision. Where such perturbed runs part by themselves, the verdict is ill-conditioned.

    Args:
      flax_side: model, optimizer and step.
      torch_side: their counterparts.
      batches: each a sequence of arrays, features last; they are repeated as often as needed.
      steps: how many steps to train.
      layout: see :func:`compare`.
      weights: see :func:`compare`.
      rename: see :func:`compare`.
      dtypes: ``(float32,)`` or nothing.
      witness: see :func:`compare`.
      tolerances: see :func:`compare`.

    Returns:
      The report; ``report.departure`` names the first step and tensor that leave their bound.

    Raises:
      ValueError: as :func:`compare`; if there are no batches; for other dtypes.

    Example:
      >>> import numpy, optax, torch
      >>> from flaxstab import linear
      >>> def step(model, optimizer, x):
      ...     loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> def torch_step(model, optimizer, x):
      ...     optimizer.zero_grad()
      ...     loss = (model(x) ** 2).mean()
      ...     loss.backward()
      ...     optimizer.step()
      ...     return loss
      >>> ours = TrainStep(
      ...     linear.Linear(3, 2, rngs=nnx.Rngs(0)),
      ...     lambda model: nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param),
      ...     step,
      ... )
      >>> theirs = TrainStep(
      ...     torch.nn.Linear(3, 2),
      ...     lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
      ...     torch_step,
      ... )
      >>> trajectory(ours, theirs, [[numpy.eye(3)]], steps=20).passed
      True
    """
    return train_both(
        flax_side, torch_side, batches, steps=steps, layout=layout, weights=weights,
        rename=rename, dtypes=dtypes, witness=witness, tolerances=tolerances,
    )  # fmt: skip


def train_both(
    flax_side: TrainStep,
    torch_side: TrainStep | RecordedSteps,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    steps: int,
    layout: Layout = None,
    weights: Weights = "torch",
    rename: Rename | None = None,
    dtypes: Sequence[DTypeLike] = (),
    witness: TrainStep | None = None,
    tolerances: Sequence[Tolerance] = (),
    watch: Watch | None = None,
) -> Report:
    """Trains both sides; see :func:`trajectory`.

    Args:
      flax_side: as of ``trajectory``, likewise all others that are not named here.
      torch_side: PyTorch's side, or what was recorded of it.
      batches: see ``trajectory``.
      steps: see ``trajectory``.
      layout: see ``trajectory``.
      weights: see ``trajectory``.
      rename: see ``trajectory``.
      dtypes: see ``trajectory``.
      witness: see ``trajectory``.
      tolerances: see ``trajectory``.
      watch: is shown what both sides computed, step by step.
    """
    kinds_of_torch = TrainStep | RecordedSteps
    both = isinstance(flax_side, TrainStep) and isinstance(torch_side, kinds_of_torch)
    given = f"{type(flax_side).__name__} and {type(torch_side).__name__}"
    check(both, "both sides must be a parity.TrainStep", sides=given)
    check_positive(steps=steps)
    allowed = check_tolerances(tolerances)
    kinds = [jnp.dtype(kind).name for kind in dtypes]
    check(set(kinds) <= {"float32"}, "dtypes of training steps must be float32", dtypes=kinds)
    known = [tuple(interop.to_numpy(a) for a in batch) for batch in batches]
    check(len(known) > 0, "batches must hold at least one batch", batches=[])
    ours = _FlaxStep(flax_side)
    theirs: _TorchStep | RecordedSteps
    if isinstance(torch_side, RecordedSteps):
        theirs = torch_side
    else:
        theirs = _TorchStep(torch_side, ours, layout, rename)
    other = None
    theirs.optional |= {f"buffer {n}" for n in carry(ours.program, theirs.side, weights)}
    if witness is not None:
        other = _TorchStep(witness, ours, layout, rename)
        other.side.load(theirs.side.tensors())
    return lockstep(
        ours,
        theirs,
        islice(cycle(known), steps),
        dtypes=dtypes,
        tolerances=allowed,
        witness=other,
        watch=watch,
    )


def ten_batches(batch: Batch) -> list[Batch]:
    """Returns batches whose first array grows from step to step, if it is floating-point."""
    first, *others = batch
    grown = [first * growth(step) if is_float(first) else first for step in range(STEPS)]
    return [(array, *others) for array in grown]


class _FlaxStep:
    """JAX's training step as a pure function of everything that it changes."""

    def __init__(self, side: TrainStep) -> None:
        check(
            isinstance(side.model, nnx.Module),
            "flax_side.model must be an nnx.Module",
            model=type(side.model).__name__,
        )
        self.program = NNXProgram(side.model)
        self._side = side
        self._graph: PyTree = None

    def start(self, precision: Precision) -> PyTree:
        model = nnx.clone(self.program.module)
        nnx.update(model, stored_as(nnx.state(model), precision))
        with located("Flax", self.program.names(), ()):
            optimizer = self._side.optimizer(model)
        check(
            isinstance(optimizer, nnx.Optimizer),
            "flax_side.optimizer must make an nnx.Optimizer of a model",
            made=type(optimizer).__name__,
            fix="Pass lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param).",
        )
        self._graph, state = nnx.split((model, optimizer))
        return state

    def advance(self, state: PyTree, batch: list[Array]) -> tuple[Mapping[str, Array], PyTree]:
        model, optimizer = nnx.merge(self._graph, state, copy=True)
        with located("Flax", self.program.names(), batch):
            loss = self._side.step(model, optimizer, *batch)
        check(
            isinstance(loss, jax.Array) and loss.shape == (),
            "a training step must return the loss, a scalar array",
            returned=type(loss).__name__,
        )
        return {"loss": loss}, nnx.state((model, optimizer))

    def model(self, state: PyTree) -> nnx.Module:
        """Returns the model of a state."""
        return nnx.merge(self._graph, state, copy=True)[0]

    def unnamed(self, state: PyTree) -> list[str]:
        _, optimizer = nnx.merge(self._graph, state, copy=True)
        return unnamed(nnx.as_pure(optimizer.opt_state))

    def named(self, state: PyTree) -> Values:
        model, optimizer = nnx.merge(self._graph, state, copy=True)
        named = self.program.named
        found: dict[str, PyTree] = {
            f"param {n}": a for n, a in named(nnx.state(model, nnx.Param)).items()
        }
        found |= {f"buffer {n}": a for n, a in named(nnx.state(model, nnx.Not(nnx.Param))).items()}
        moments = functools.partial(named, gradients=True)  # they travel as gradients do
        return found | jax_state(nnx.as_pure(optimizer.opt_state), moments)


class _TorchStep:
    """PyTorch's training step."""

    def __init__(
        self, side: TrainStep, twin: _FlaxStep, layout: Layout, rename: Rename | None
    ) -> None:
        self.side = TorchSide(side.model, rename)
        check(
            self.side.module is not None,
            "torch_side.model must be a torch.nn.Module",
            model=type(side.model).__name__,
        )
        self._given, self._twin, self._layout = side, twin, layout
        self.optional: set[str] = set()
        self.draws = Draws()

    def start(self, precision: Precision) -> Callable[[Batch, PyTree], Values]:
        model = at_precision(self.side.module, precision)
        with located("PyTorch", None, ()):
            made = self._given.optimizer(model)
        optimizer = _optimizer(made)
        names = {p: self.side.rename(n) for n, p in model.named_parameters()}
        kind = torch_dtype(precision.compute)

        def copied() -> dict[str, np.ndarray]:
            return {f"param {n}": numpy_of(p).copy() for p, n in names.items()}

        exact = precision.compute == np.float64
        draws = self.draws if exact else Draws()  # a lower precision draws the same masks again

        def step(batch: Batch, state: PyTree) -> Values:
            tensors = [torch_tensor(channels_first(a, self._layout)) for a in batch]
            tensors = [t.to(kind) if t.is_floating_point() else t for t in tensors]
            before = copied()
            with (
                jax_at(precision),  # as the run whose draws it takes
                replayed(self._twin.model(state), model, self._layout, draws, self.side.rename),
                located("PyTorch", self.side.names(), batch),
            ):
                loss = self._given.step(model, made, *tensors)
            found = copied()
            moments = torch_state(optimizer, names)
            self.optional.update(moments)
            buffers = {f"buffer {n}": b for n, b in self.side.buffers(model).items()}
            return {"loss": _number(loss)} | found | updates(before, found) | buffers | moments

        return step


def _optimizer(made: object) -> "torch.optim.Optimizer":
    import torch

    parts = made if isinstance(made, tuple) else (made,)
    found = [part for part in parts if isinstance(part, torch.optim.Optimizer)]
    check(
        len(found) == 1,
        "torch_side.optimizer must make one torch.optim.Optimizer, alone or in a tuple",
        made=type(made).__name__,
    )
    return found[0]


def _number(loss: object) -> np.ndarray:
    import torch

    return numpy_of(loss).copy() if isinstance(loss, torch.Tensor) else np.asarray(loss)
