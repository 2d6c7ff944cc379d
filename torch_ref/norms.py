"""Batch normalisation for small and for frozen statistics: document 2, D-2 and D-3."""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ref.functional import batch_norm_eval


class GhostBatchNorm(nn.Module):
    """Batch normalisation over virtual batches (document 2, D-2; arXiv 1705.08741).

    In training the batch is cut by ``torch.chunk(x, ceil(N / virtual_batch_size))``: 33 rows at 32
    become 17 + 16. The chunks update the running statistics one after the other and count one each.
    Evaluation uses the running statistics. The state has the names of ``nn.BatchNorm``. A chunk
    that leaves one value per channel raises torch's ``ValueError``: ``(5, C)`` at 2 is 2 + 2 + 1.

    Args:
        num_features: Channels.
        virtual_batch_size: Largest number of rows that share their statistics.
        eps: Added to the variance.
        momentum: Weight of the new value; None is the cumulative average over all chunks so far.
        affine: Whether there are gamma and beta.
    """

    def __init__(
        self,
        num_features: int,
        virtual_batch_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if virtual_batch_size < 1:
            raise ValueError(
                f"virtual_batch_size must be at least 1, got {virtual_batch_size}; "
                "use 32, say, or nn.BatchNorm for the whole batch."
            )
        self.virtual_batch_size = virtual_batch_size
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, *space)``, by chunks in training."""
        if not self.training:
            return self._normalise(x, momentum=0.0)
        outputs = []
        for chunk in torch.chunk(x, math.ceil(len(x) / self.virtual_batch_size)):
            self.num_batches_tracked += 1
            cumulative = 1.0 / self.num_batches_tracked.item()
            outputs.append(
                self._normalise(chunk, cumulative if self.momentum is None else self.momentum)
            )
        return torch.cat(outputs)

    def _normalise(self, x: Tensor, momentum: float) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            momentum,
            self.eps,
        )


class FrozenBatchNorm(nn.Module):
    """Batch normalisation that never changes (document 2, D-3, as intended).

    Statistics, gamma and beta are buffers: no optimizer sees them and ``train()`` does not undo it,
    other than with the document's ``set_bn_eval``. Gradients pass through to the input.

    Args:
        num_features: Channels.
        eps: Added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @classmethod
    def from_batch_norm(cls, norm: _BatchNorm) -> Self:
        """Freeze a copy of ``norm``; without affine parameters gamma is 1 and beta is 0.

        Args:
            norm: Any ``nn.BatchNorm`` with running statistics.

        Returns:
            The frozen layer, on the device and in the dtype of ``norm``.

        Raises:
            ValueError: ``norm`` keeps no running statistics.
        """
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                "freezing needs running statistics, got a batch norm with "
                "track_running_stats=False; build it with track_running_stats=True."
            )
        frozen = cls(norm.num_features, norm.eps).to(norm.running_mean)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            if value is not None:
                getattr(frozen, name).copy_(value.detach())
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, *space)`` with the frozen statistics."""
        return batch_norm_eval(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )
