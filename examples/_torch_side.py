"""The mini project in PyTorch: the twin that the JAX run is compared with."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from _data import Cifar10
from _plan import Evaluation, Gap, Plan, Step
from torch.nn import functional

from torch_ref.models import StableCNN
from torch_ref.optim import mini_project_groups
from torch_ref.training import warmup_cosine

TEST_BATCH = 250


class TorchRun:
    """One training run with the same interface as ``JaxRun``, on the CPU or a GPU.

    Args:
      plan: the run's settings.
      data: normalised images, channels last, and labels.
      device: where to train.
    """

    def __init__(self, plan: Plan, data: Cifar10, device: str = "cpu") -> None:
        self.plan = plan
        self.gaps: list[Gap] = []
        self.devices = 1
        torch.manual_seed(plan.seed)
        kind = torch.float64 if plan.dtype == "float64" else torch.float32
        sizes = {"widths": plan.widths, "groups": plan.groups}
        self.model = StableCNN(plan.norm, plan.act, drop=plan.drop, **sizes).to(device, kind)
        groups = mini_project_groups(self.model, plan.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
        self._data = Cifar10(*(self._tensor(a, device) for a in data))
        self._device, self._order, self._position, self._count = device, None, 0, 0
        self._reports: list[Step] = []

    @staticmethod
    def _tensor(array: np.ndarray, device: str) -> torch.Tensor:
        moved = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array.astype(np.int64)
        return torch.tensor(np.ascontiguousarray(moved), device=device)

    def start_epoch(self, order: np.ndarray) -> None:
        """Sets the order of the epoch's samples."""
        self._order = torch.tensor(order.astype(np.int64), device=self._device)
        self._position, self._reports = 0, []

    def reports(self, start: int, stop: int) -> Sequence[Step]:
        """Returns what the epoch's steps ``start`` to ``stop`` reported."""
        return self._reports[start:stop]

    def step(self) -> None:
        """Takes one training step."""
        plan, size = self.plan, self.plan.batch_size
        chosen = self._order[self._position * size : (self._position + 1) * size]
        images, labels = self._data.train_images[chosen], self._data.train_labels[chosen]
        rate = warmup_cosine(self._count, plan.warmup_steps, plan.total_steps, plan.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            logits = self.model(images)
        smoothing = plan.label_smoothing
        logits = logits.to(torch.float64 if plan.dtype == "float64" else torch.float32)
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.max_norm)
        self.optimizer.step()
        accuracy = (logits.argmax(-1) == labels).double().mean()
        self._reports.append(Step(loss.item(), accuracy.item(), norm.item(), rate))
        self._position += 1
        self._count += 1

    def evaluate(self) -> Evaluation:
        """Returns loss and accuracy on the test set, by the running statistics."""
        self.model.eval()
        loss, correct, total = 0.0, 0, len(self._data.test_labels)
        with torch.no_grad(), self._precision():
            for i in range(0, total, TEST_BATCH):
                labels = self._data.test_labels[i : i + TEST_BATCH]
                logits = self.model(self._data.test_images[i : i + TEST_BATCH]).float()
                loss += functional.cross_entropy(logits, labels, reduction="sum").item()
                correct += (logits.argmax(-1) == labels).sum().item()
        return Evaluation(loss / total, correct / total)

    def _precision(self) -> "torch.autocast | nullcontext[None]":
        if self.plan.dtype == "bfloat16":
            return torch.autocast(self._device, torch.bfloat16)
        return nullcontext()
