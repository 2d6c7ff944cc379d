"""The documents' formulas without modules: normalisation, dropout, losses and penalties.

Channels stand on axis 1, as in PyTorch. Written for reading and for checking, not for speed.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

WORKED_EXAMPLE = torch.tensor(
    [[-0.6577, -0.5797, 0.6360], [0.7392, 0.2145, 1.523], [0.2432, 0.5662, 0.322]]
)
"""Document 1's batch of 3 samples with 3 features; the document prints no result for it."""


def _standardise(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """Subtract the mean over ``axes`` and divide by the root of the biased variance plus eps."""
    centred = x - x.mean(tuple(axes), keepdim=True)
    variance = (centred**2).mean(tuple(axes), keepdim=True)
    return centred / torch.sqrt(variance + eps)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))  # (C,) -> (C, 1, ..., 1)


def _scale_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = x if weight is None else x * _channels(weight, x)
    return scaled if bias is None else scaled + _channels(bias, x)


def batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Batch normalisation of a training batch (document 1; document 2, C-1).

    Per channel over batch and space: gamma * (x - mean) / sqrt(var + eps) + beta. The documents
    write one variance: this one is the biased one, the running variance takes the unbiased one
    (:func:`updated_running_statistics`). Document 1 says that normalisation happens only during
    training; evaluation normalises too, with the running statistics (:func:`batch_norm_eval`).

    Args:
        x: ``(N, C)`` or ``(N, C, *space)``.
        weight: gamma, ``(C,)``; None is 1.
        bias: beta, ``(C,)``; None is 0.
        eps: Added to the variance.

    Returns:
        The normalised batch, in the shape of ``x``.
    """
    axes = [0, *range(2, x.ndim)]
    return _scale_channels(_standardise(x, axes, eps), weight, bias)


def batch_norm_eval(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation in evaluation: with the running statistics (document 2, C-1)."""
    centred = x - _channels(running_mean, x)
    return _scale_channels(centred / torch.sqrt(_channels(running_var, x) + eps), weight, bias)


def updated_running_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Running mean and variance after the batch ``x`` (document 2, C-1).

    ``momentum`` weighs the new value, and the new variance is the unbiased one (divided by m - 1).

    Args:
        x: ``(N, C)`` or ``(N, C, *space)``.
        running_mean: ``(C,)`` before.
        running_var: ``(C,)`` before.
        momentum: Weight of the batch, 0 to 1.

    Returns:
        ``(running_mean, running_var)`` after.
    """
    axes = [0, *range(2, x.ndim)]
    mean, variance = x.mean(axes), x.var(axes, unbiased=True)
    return (
        (1 - momentum) * running_mean + momentum * mean,
        (1 - momentum) * running_var + momentum * variance,
    )


def synchronised_moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of a batch that lies in parts (document 2, D-2, SyncBN).

    Every part contributes its sums and its count, so parts of unequal size are weighted rightly:
    the result is that of the concatenated batch.

    Args:
        parts: Batches ``(N_i, C, *space)``, one per device.

    Returns:
        ``(mean, var)``, each ``(C,)``.
    """
    axes = [0, *range(2, parts[0].ndim)]
    count = sum(part.numel() // part.shape[1] for part in parts)
    mean = torch.stack([part.sum(axes) for part in parts]).sum(0) / count
    squares = [((part - _channels(mean, part)) ** 2).sum(axes) for part in parts]
    return mean, torch.stack(squares).sum(0) / count


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation over the trailing axes of each sample (document 2, C-2).

    Document 1 calls it "Instance Normalization" and describes that: per channel of each image. It
    is over the features of one sample. Document 2 adds the sequence length to the features; in a
    Transformer it is the features of one token.

    Args:
        x: ``(..., *normalized_shape)``.
        normalized_shape: The trailing axes.
        weight: gamma of ``normalized_shape``; None is 1.
        bias: beta of ``normalized_shape``; None is 0.
        eps: Added to the variance.

    Returns:
        The normalised tensor, in the shape of ``x``.
    """
    normalised = _standardise(x, range(-len(normalized_shape), 0), eps)
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalisation: per sample and group of channels (document 2, C-3).

    Document 1 says that one group equals instance normalisation. One group equals layer
    normalisation over (C, *space); as many groups as channels equal instance normalisation.
    ``GroupNorm(1, 64)`` in document 2, H-2 ("channels only") is thus over (C, H, W).

    Args:
        x: ``(N, C, *space)``.
        num_groups: Number of groups; divides C.
        weight: gamma, ``(C,)``; None is 1.
        bias: beta, ``(C,)``; None is 0.
        eps: Added to the variance.

    Returns:
        The normalised tensor, in the shape of ``x``.
    """
    grouped = x.reshape(x.shape[0], num_groups, -1)  # (N, C, *space) -> (N, G, C/G * space)
    return _scale_channels(_standardise(grouped, [2], eps).reshape(x.shape), weight, bias)


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Instance normalisation: per sample and channel, over space (document 2, C-4)."""
    return _scale_channels(_standardise(x, range(2, x.ndim), eps), weight, bias)


def inverted_dropout(h: Tensor, mask: Tensor, p: float) -> Tensor:
    """Mask times h over (1 - p): the mean is kept, evaluation needs no scale (document 2, E-1).

    Args:
        h: Activations.
        mask: 1 where kept, 0 where dropped; broadcasts against ``h``.
        p: Probability of dropping, 0 to 1; at 1 everything is 0.

    Returns:
        The masked and scaled activations.
    """
    return h * mask if p == 1.0 else h * (mask / (1.0 - p))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy against (1 - s) * one_hot + s / K (document 2, K and M-2).

    Args:
        logits: ``(N, K)``.
        labels: Class indices, ``(N,)``.
        label_smoothing: s, 0 to 1.

    Returns:
        The mean over the batch, a scalar.
    """
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    target = torch.full_like(logits, label_smoothing / logits.shape[1])
    target[torch.arange(len(labels)), labels] += 1.0 - label_smoothing
    return -(target * log_p).sum(1).mean()


def l1_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of |theta| (document 1, regularisation)."""
    return torch.stack([theta.abs().sum() for theta in parameters]).sum()


def l2_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Half the sum of theta**2, so that its gradient is theta (document 2, F-1).

    The document adds lambda * ||theta||**2 to the loss and lambda * theta to the gradient; that
    gradient belongs to half of it.
    """
    return 0.5 * torch.stack([(theta**2).sum() for theta in parameters]).sum()
