"""What one training run of the mini project is: settings that both frameworks share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Document 2, section M: one variant, trained with the mini project's settings.

    Attributes:
      variant: the name in logs and figures.
      norm: the network's normalisation, as ``StableCNN`` calls it.
      act: its activation.
      batch_size: samples per step.
      epochs: passes over the training set.
      train_size: samples in the training set; what does not fill a batch is left out.
      seed: of weights, batches and dropout.
      dtype: 'float32', 'float64', or 'bfloat16' for bfloat16 compute on float32 parameters.
    """

    variant: str
    norm: str
    act: str
    batch_size: int
    epochs: int
    train_size: int
    seed: int = 0
    dtype: str = "float32"
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    drop: float = 0.1
    label_smoothing: float = 0.1
    max_norm: float = 1.0
    widths: tuple[int, ...] = (32, 64, 128)
    groups: int = 16

    @property
    def name(self) -> str:
        """The run's name in logs and figures."""
        return f"{self.variant}@{self.batch_size}"

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return self.train_size // self.batch_size

    @property
    def total_steps(self) -> int:
        """How many steps the run has."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """How many steps the learning rate climbs: the document's 500, or a tenth of the run."""
        return min(500, self.total_steps // 10)

    @property
    def storage(self) -> np.dtype:
        """The dtype of images, parameters and statistics."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    def orders(self) -> Iterator[np.ndarray]:
        """Yields the order of the samples for each epoch, the same for both frameworks."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            kept = self.steps_per_epoch * self.batch_size
            yield rng.permutation(self.train_size)[:kept].astype(np.int32)


@dataclass(frozen=True)
class Step:
    """What one training step reports."""

    loss: float
    accuracy: float
    gradient_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Gap:
    """How far apart JAX and PyTorch are after a step: largest relative differences.

    Attributes:
      loss: of the training loss.
      parameters: of any parameter tensor, relative to its largest element or the learning rate.
      statistics: of any running statistic.
      moments: of any tensor of the optimizer's state.
      twin: of any parameter between the JAX run and its copy that started one eps away.
      worst: the parameter tensor that is furthest apart.
    """

    loss: float
    parameters: float
    statistics: float
    moments: float
    twin: float
    worst: str


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the test set reports."""

    loss: float
    accuracy: float


class Run(Protocol):
    """A training run in either framework, or in both.

    Attributes:
      gaps: how far the frameworks were apart after each step; empty for one framework.
    """

    gaps: list[Gap]

    @property
    def devices(self) -> int:
        """How many devices the batches are spread over."""

    def start_epoch(self, order: np.ndarray) -> None:
        """Sets the order of the epoch's samples."""

    def step(self) -> None:
        """Takes one training step."""

    def reports(self, start: int, stop: int) -> Sequence[Step]:
        """Returns what the epoch's steps ``start`` to ``stop`` reported."""

    def evaluate(self) -> Evaluation:
        """Returns loss and accuracy on the test set."""


@runtime_checkable
class EvaluatesTwin(Protocol):
    """A run that has a twin in the other framework."""

    def evaluate_twin(self) -> Evaluation:
        """Returns the twin's loss and accuracy on the test set."""
