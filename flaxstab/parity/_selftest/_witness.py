"""Plain formulas in PyTorch, channels at axis 1: the third opinion, in which no fault is planted.

They call no layer, loss, optimizer or function of ``torch.nn``, for faults are planted there.
"""

import copy
import itertools
import math
from typing import TYPE_CHECKING

from flaxstab.parity._selftest._plant import Function

if TYPE_CHECKING:
    import torch


def plain(layer: "torch.nn.Module", formula: Function) -> "torch.nn.Module":
    """Returns a module with a layer's parameters and statistics that computes a formula.

    Args:
      layer: whose tensors it has, by the same names.
      formula: from that module and the inputs to the output.
    """
    import torch

    class Plain(torch.nn.Module):
        def forward(self, *inputs: "torch.Tensor") -> "torch.Tensor":
            return formula(self, *inputs)

    module = Plain()
    for name, parameter in layer.named_parameters(recurse=False):
        module.register_parameter(name, copy.deepcopy(parameter))
    for name, buffer in layer.named_buffers(recurse=False):
        module.register_buffer(name, buffer.clone())
    return module


def batch_norm(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    """Normalises as ``torch.nn.BatchNorm2d`` with its defaults."""
    import torch

    from torch_ref import functional

    if not layer.training:
        statistics = layer.running_mean, layer.running_var
        return functional.batch_norm_eval(x, *statistics, layer.weight, layer.bias)
    with torch.no_grad():
        new = functional.updated_running_statistics(x, layer.running_mean, layer.running_var)
        layer.running_mean.copy_(new[0])
        layer.running_var.copy_(new[1])
        layer.num_batches_tracked += 1
    return functional.batch_norm(x, layer.weight, layer.bias)


def instance_norm(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    """Normalises as ``torch.nn.InstanceNorm2d`` with running statistics, which never counts."""
    import torch

    from torch_ref import functional

    if not layer.training:
        statistics = layer.running_mean, layer.running_var
        return functional.batch_norm_eval(x, *statistics, layer.weight, layer.bias)
    with torch.no_grad():
        mean, var = x.mean((2, 3)).mean(0), x.var((2, 3)).mean(0)
        layer.running_mean.copy_(0.9 * layer.running_mean + 0.1 * mean)
        layer.running_var.copy_(0.9 * layer.running_var + 0.1 * var)
    return functional.instance_norm(x, layer.weight, layer.bias)


def conv(
    x: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor",
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> "torch.Tensor":
    """Correlates images with square kernels, one window element after the other."""
    import torch

    out = (x.shape[-1] + 2 * padding - dilation * (weight.shape[-1] - 1) - 1) // stride + 1
    x = _padded(x, padding, 0.0)
    results = []
    for part, kernel in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True):
        total = x.new_zeros(x.shape[0], kernel.shape[0], out, out)
        for i, j in itertools.product(range(kernel.shape[2]), range(kernel.shape[3])):
            seen = _shifted(part, i * dilation, j * dilation, stride, out)
            total = total + torch.einsum("nchw,oc->nohw", seen, kernel[:, :, i, j])
        results.append(total)
    return torch.cat(results, 1) + bias[:, None, None]


def conv_transpose(
    x: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor",
    stride: int,
    padding: int,
    output_padding: int,
    groups: int,
) -> "torch.Tensor":
    """Adds each pixel's square kernel where it lands in the output, then cuts the frame off."""
    import torch

    size, side = weight.shape[-1], x.shape[-1]
    whole = (side - 1) * stride + size + output_padding
    reach = (side - 1) * stride + 1
    results = []
    for part, kernel in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True):
        total = x.new_zeros(x.shape[0], kernel.shape[1], whole, whole)
        for i, j in itertools.product(range(size), range(size)):
            landed = torch.zeros_like(total)
            placed = torch.einsum("nchw,co->nohw", part, kernel[:, :, i, j])
            landed[:, :, i : i + reach : stride, j : j + reach : stride] = placed
            total = total + landed
        results.append(total)
    kept = slice(padding, whole - padding)
    return torch.cat(results, 1)[:, :, kept, kept] + bias[:, None, None]


def embedding(ids: "torch.Tensor", weight: "torch.Tensor", padding: int) -> "torch.Tensor":
    """Looks rows up; the padding row as a constant."""
    import torch

    chosen = torch.eye(len(weight), dtype=weight.dtype)[ids]
    learning = torch.arange(len(weight)) != padding
    return chosen @ torch.where(learning[:, None], weight, weight.detach())


def windows(x: "torch.Tensor", size: int, stride: int, padding: int, fill: float) -> "torch.Tensor":
    """Returns the elements of every window, shape ``(size², N, C, H', W')``."""
    import torch

    out = (x.shape[-1] + 2 * padding - size) // stride + 1
    x = _padded(x, padding, fill)
    places = itertools.product(range(size), range(size))
    return torch.stack([_shifted(x, i, j, stride, out) for i, j in places])


def _padded(x: "torch.Tensor", padding: int, fill: float) -> "torch.Tensor":
    side = x.shape[-1]
    frame = x.new_full((*x.shape[:2], side + 2 * padding, side + 2 * padding), fill)
    frame[:, :, padding : padding + side, padding : padding + side] = x
    return frame


def _shifted(x: "torch.Tensor", i: int, j: int, stride: int, out: int) -> "torch.Tensor":
    reach = (out - 1) * stride + 1
    return x[:, :, i : i + reach : stride, j : j + reach : stride]


def attention(
    layer: "torch.nn.MultiheadAttention",
    x: "torch.Tensor",
    memory: "torch.Tensor",
    mask: "torch.Tensor",
) -> "torch.Tensor":
    """Attends from x to a memory, batch first, with a mask of booleans or floats.

    Dropout alone is a call of ``torch.nn.functional``: it is how the mask is replayed.
    """
    import torch
    from torch.nn import functional

    def heads(x: "torch.Tensor", part: int) -> "torch.Tensor":
        weight, bias = layer.in_proj_weight.chunk(3)[part], layer.in_proj_bias.chunk(3)[part]
        return (x @ weight.T + bias).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

    q, k, v = heads(x, 0), heads(memory, 1), heads(memory, 2)
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # (N, H, L, S)
    mask = mask.unflatten(0, (len(x), -1)) if mask.ndim == 3 else mask
    is_boolean = mask.dtype == torch.bool
    logits = logits.masked_fill(mask, -torch.inf) if is_boolean else logits + mask
    blind = logits.isneginf().all(-1, keepdim=True)
    weights = torch.where(blind, 0, torch.softmax(logits.masked_fill(blind, 0), -1))
    if layer.training and layer.dropout > 0:
        weights = functional.dropout(weights.flatten(0, 1), p=layer.dropout).view_as(weights)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return mixed @ layer.out_proj.weight.T + layer.out_proj.bias


def gelu(x: "torch.Tensor") -> "torch.Tensor":
    """The exact Gaussian error linear unit."""
    import torch

    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def cross_entropy(
    logits: "torch.Tensor",
    labels: "torch.Tensor",
    smoothing: float,
    weight: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """Mean cross entropy with smoothing, over the labels that are not -100."""
    import torch

    kept = labels != -100
    logits, labels = logits[kept], labels[kept]
    log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(target * weight * log_p).sum() / weight[labels].sum()
