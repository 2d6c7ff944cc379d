"""The mini project's training loop, early stopping and gradient accumulation.

Document 2, M-2, K and D-2; document 1, over- and underfitting.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from torch_ref.optim import ParamGroup, mini_project_groups, mini_project_groups_as_printed

# the mini project's settings
PEAK = 3e-4
LABEL_SMOOTHING = 0.1
CLIP = 1.0

Batch = tuple[Tensor, Tensor]


@dataclass
class History:
    """What a run leaves: one loss and learning rate per step, one validation loss per epoch."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)


def _set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _warm_up_as_printed(optimizer: Optimizer, step: int, warmup: int) -> None:
    if step < warmup:
        _set_learning_rate(optimizer, PEAK * (step / warmup))


def _adamw(groups: list[ParamGroup]) -> AdamW:
    return AdamW(groups, lr=PEAK, betas=(0.9, 0.999), eps=1e-8)


def train_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    """One step with label smoothing 0.1 and the gradient norm clipped to 1 (document 2, M-2).

    Returns:
        The loss before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), y, label_smoothing=LABEL_SMOOTHING)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()


def _validation_loss(model: nn.Module, batches: Collection[Batch]) -> float:
    model.eval()
    with torch.no_grad():
        total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def train_as_printed(
    model: nn.Module,
    train_batches: Collection[Batch],
    validation_batches: Collection[Batch] = (),
    epochs: int = 100,
    warmup: int = 500,
) -> History:
    """The mini project's loop (document 2, M-2, as printed).

    The warmup writes the learning rate, while the scheduler, stepped once per epoch, multiplies
    whatever it finds by a ratio of cosines. What the warmup wrote last thus stays: with 500 warmup
    steps and 10 epochs of 120 steps the rate is 1.52 times the cosine over epochs until the end.
    Steps count from 1, and step ``warmup`` itself writes nothing: the highest rate is one part in
    ``warmup`` below the peak.
    The groups have the holes of :func:`mini_project_groups_as_printed`. :func:`train` is what is
    meant.

    Args:
        model: A classifier; changed in place.
        train_batches: The batches of one epoch, ``(x, labels)``.
        validation_batches: Batches for the loss without smoothing behind each epoch; the document
            leaves this part out. None are used if it is empty.
        epochs: Passes over ``train_batches``.
        warmup: Steps of the linear warmup.

    Returns:
        The history.
    """
    optimizer = _adamw(mini_project_groups_as_printed(model))
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    history = History()
    for _ in range(epochs):
        model.train()
        for x, y in train_batches:
            _warm_up_as_printed(optimizer, len(history.losses) + 1, warmup)
            history.learning_rates.append(optimizer.param_groups[0]["lr"])
            history.losses.append(train_step(model, optimizer, x, y))
        scheduler.step()
        if validation_batches:
            history.validation_losses.append(_validation_loss(model, validation_batches))
    return history


def learning_rate_trace(epochs: int, steps_per_epoch: int, warmup: int = 500) -> list[float]:
    """Learning rate of every step of :func:`train_as_printed`, without training.

    Drives torch's own ``CosineAnnealingLR`` on an optimizer with nothing to do.
    """
    optimizer = SGD([nn.Parameter(torch.zeros(()))], lr=PEAK)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    trace: list[float] = []
    for _ in range(epochs):
        for _ in range(steps_per_epoch):
            _warm_up_as_printed(optimizer, len(trace) + 1, warmup)
            trace.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return trace


def warmup_cosine(
    count: int, warmup_steps: int, total_steps: int, peak: float = PEAK, end: float = 0.0
) -> float:
    """Linear warmup, then cosine over steps: the schedule that document 2, M means.

    The values of torch's ``SequentialLR`` of a ``LinearLR`` from 0 and a ``CosineAnnealingLR``:
    the first step's rate is 0, where the printed loop begins with ``peak / warmup``; the cosine
    begins at ``peak`` at ``count == warmup_steps`` and would be at ``end`` at
    ``count == total_steps``, one past the last step. It stays there.

    Args:
        count: Steps taken before this one, from 0.
        warmup_steps: Steps of the warmup.
        total_steps: Steps of the whole run.
        peak: Highest learning rate.
        end: Learning rate after the run.

    Returns:
        The learning rate of step ``count``.
    """
    if count < warmup_steps:
        return peak * count / warmup_steps
    done = min(1.0, (count - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def train(
    model: nn.Module,
    train_batches: Collection[Batch],
    validation_batches: Collection[Batch] = (),
    epochs: int = 100,
    warmup: int = 500,
) -> History:
    """The mini project's loop as meant: every parameter in one group, :func:`warmup_cosine`.

    Arguments and result as :func:`train_as_printed`.
    """
    optimizer = _adamw(mini_project_groups(model))
    total_steps = epochs * len(train_batches)
    history = History()
    for _ in range(epochs):
        model.train()
        for x, y in train_batches:
            lr = warmup_cosine(len(history.losses), warmup, total_steps)
            _set_learning_rate(optimizer, lr)
            history.learning_rates.append(lr)
            history.losses.append(train_step(model, optimizer, x, y))
        if validation_batches:
            history.validation_losses.append(_validation_loss(model, validation_batches))
    return history


class EarlyStopping:
    """Say when a value that should fall has stopped falling (document 1; document 2, K).

    Args:
        patience: Values without improvement that are borne; the last of them stops.
        min_delta: An improvement is more than this below the best value.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(
                f"patience must be at least 1, got {patience}; 1 stops at the first value "
                "without improvement."
            )
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.waited = 0

    def update(self, value: float) -> bool:
        """Take the next value, NaN being no improvement, and return whether to stop."""
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """Add up the gradients of a mean loss over several batches (document 2, D-2).

    Without batch norm the gradients are those of the concatenated batch. Batch norm still sees each
    small batch by itself: it normalises by its statistics and takes them over.

    Args:
        model: The model; its ``grad`` fields are added to.
        batches: The parts of the large batch; each counts by its size.
        loss_fn: Mean loss of ``(outputs, labels)``.

    Returns:
        The mean loss over all batches.
    """
    count = sum(len(y) for _, y in batches)
    total = 0.0
    for x, y in batches:
        loss = loss_fn(model(x), y) * (len(y) / count)
        loss.backward()
        total += loss.item()
    return total
