"""JAX and PyTorch step by step: same weights, same batches, same dropout masks."""

import jax.numpy as jnp
import numpy as np
import torch
from _data import Cifar10
from _jax_side import JaxRun
from _plan import Evaluation, Gap, Plan, Step
from _torch_side import TorchRun

from flaxstab import interop, parity


class BothRuns:
    """Trains JAX, its PyTorch twin, and a copy of the JAX run whose weights start one eps away.

    The copy, each weight of which starts one eps up or down at random, shows how one rounding
    grows: JAX and PyTorch round differently at every step, so they may be some times further
    apart, but not in another way.

    Args:
      plan: the run's settings.
      data: normalised images and labels.
    """

    def __init__(self, plan: Plan, data: Cifar10) -> None:
        self.plan = plan
        self._jax, self._torch = JaxRun(plan, data), TorchRun(plan, data)
        weights = interop.state_dict(self._jax.model)
        tensors = {name: torch.tensor(array) for name, array in weights.items()}
        self._torch.model.load_state_dict(tensors)
        self._copy = self._jax.perturbed(float(jnp.finfo(plan.dtype).eps))
        self.gaps: list[Gap] = []
        self.devices = self._jax.devices
        self._done = 0

    def start_epoch(self, order: np.ndarray) -> None:
        """Sends the order of the epoch's samples to every run."""
        for run in (self._jax, self._torch, self._copy):
            run.start_epoch(order)
        self._done = 0

    def step(self) -> None:
        """Takes one step in every run and measures how far apart they are."""
        with parity.replayed(self._jax.model, self._torch.model, layout="image"):
            self._torch.step()
        self._jax.step()
        self._copy.step()
        self._done += 1
        self.gaps.append(self._gap())

    def reports(self, start: int, stop: int) -> list[Step]:
        """Returns what the JAX run's steps reported."""
        return self._jax.reports(start, stop)

    def evaluate(self) -> Evaluation:
        """Returns the JAX run's loss and accuracy on the test set."""
        return self._jax.evaluate()

    def evaluate_twin(self) -> Evaluation:
        """Returns the PyTorch run's loss and accuracy on the test set."""
        return self._torch.evaluate()

    def _gap(self) -> Gap:
        model = self._jax.model
        ours, theirs = (
            run.reports(self._done - 1, self._done)[0].loss for run in (self._jax, self._torch)
        )
        # A bias that starts at 0 is as large as the steps it has taken: relative to the step size.
        floor = self.plan.learning_rate
        parameters, statistics = parity.model_distances(model, self._torch.model, floor=floor)
        moments = parity.adam_distance(
            model, self._jax.optimizer.opt_state, self._torch.model, self._torch.optimizer
        )
        named = dict(self._torch.model.named_parameters())
        pair = (interop.state_dict(m) for m in (self._copy.model, model))
        twin = parity.distance(*({n: d[n] for n in named} for d in pair), floor=floor)
        return Gap(
            abs(ours - theirs) / abs(theirs), parameters.value, statistics.value, moments.value,
            twin.value, parameters.name,
        )  # fmt: skip
