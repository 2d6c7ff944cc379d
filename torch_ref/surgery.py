"""Changing a built model: document 2, B-6 and D.

Functions that replace modules work like ``nn.SyncBatchNorm.convert_sync_batchnorm``: they change
the model's children in place and return the model, which is a new module where the model itself is
replaced. Use the result.
"""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ref.blocks import BasicBlock, Bottleneck, PreActBottleneck, PreActResBlock
from torch_ref.initializers import zeros_
from torch_ref.norms import FrozenBatchNorm


def zero_last_bn_gamma_as_printed(module: nn.Module) -> None:
    """Zero the gamma of every ``BatchNorm2d`` (document 2, B-6, as printed).

    The document's own comment says that a condition is missing. Without it the first norm of a
    branch and the norm of the skip are zeroed too: a block that projects its skip then returns 0
    whatever its input.
    :func:`zero_last_bn_gamma` has the condition.
    """
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d) and child.weight is not None:
            zeros_(child.weight)


def zero_last_bn_gamma(module: nn.Module) -> list[str]:
    """Zero the gamma of the last norm of each post-activation branch (document 2, B-6, as meant).

    Each post-activation block then starts as ReLU of its skip and trains. The document calls
    this common in pre-activation ResNets; there gamma = beta = 0 stands before a ReLU and its
    gradient is zero for ever, so :class:`PreActResBlock` is left alone: see
    :func:`zero_last_convolution`.

    Returns:
        The names of the norms that were zeroed.
    """
    return _zero_last(module, {BasicBlock: "bn2", Bottleneck: "bn3"})


def zero_last_convolution(module: nn.Module) -> list[str]:
    """Zero the last kernel of each pre-activation branch, which stays trainable (B-6, as meant).

    Returns:
        The names of the convolutions that were zeroed.
    """
    return _zero_last(module, {PreActResBlock: "conv2", PreActBottleneck: "conv3"})


def _zero_last(module: nn.Module, last: dict[type[nn.Module], str]) -> list[str]:
    names = []
    for name, block in module.named_modules():
        if type(block) in last:
            zeros_(getattr(block, last[type(block)]).weight)
            names.append(f"{name}.{last[type(block)]}".lstrip("."))
    return names


def set_bn_eval(module: nn.Module) -> None:
    """Frozen BN for ``model.apply(set_bn_eval)`` (document 2, D-3, as printed).

    The next ``model.train()``, which a loop calls each epoch, puts the running statistics back to
    training; and a norm with ``affine=False`` raises ``AttributeError``. :func:`freeze_batch_norm`
    does neither.
    """
    if isinstance(module, _BatchNorm):
        module.eval()
        module.weight.requires_grad_(False)
        module.bias.requires_grad_(False)


def _replace_batch_norms(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Put ``make(norm)`` in place of every batch norm; one that is shared stays shared."""
    if isinstance(module, _BatchNorm):
        return make(module)
    made: dict[nn.Module, nn.Module] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, _BatchNorm):
            if child not in made:
                made[child] = make(child).train(child.training)
            module.set_submodule(name, made[child])
    return module


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Put a :class:`FrozenBatchNorm` in place of every batch norm (document 2, D-3, as meant).

    Not undone by ``train()``, and works without affine parameters.

    Returns:
        The model.

    Raises:
        ValueError: A batch norm keeps no running statistics.
    """
    return _replace_batch_norms(module, FrozenBatchNorm.from_batch_norm)


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Put an ``nn.SyncBatchNorm`` in place of every batch norm (document 2, D-2).

    Without a process group, and in evaluation, it computes as before. With one, the devices train
    with the moments of the whole batch, which is :func:`torch_ref.functional.synchronised_moments`.

    Returns:
        The model.
    """
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def replace_batch_norm(module: nn.Module, groups: int = 32) -> nn.Module:
    """Put group normalisation in place of every batch norm (document 2, D-2 and G-3).

    ``groups=1`` is the documents' "LN" of an image: over (C, H, W) of one sample, not over channels
    only. gamma, beta and eps are kept, running statistics are dropped.

    Args:
        module: The model.
        groups: Number of groups; divides the channels of every batch norm.

    Returns:
        The model.
    """

    def make(norm: _BatchNorm) -> nn.Module:
        new = nn.GroupNorm(groups, norm.num_features, norm.eps, norm.affine)
        if norm.affine:
            new.weight, new.bias = norm.weight, norm.bias
        return new

    return _replace_batch_norms(module, make)
