"""Faults of normalisation: statistics, eps, the affine step, and what is remembered."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import Moments, RunningStats, _batch_norms, _standardize
from flaxstab.functional._moments import Sets
from flaxstab.norms import _base
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    Planted,
    argument,
    replaced,
    result,
    torch_functional,
)

if TYPE_CHECKING:
    import torch

_FLOAT32 = float(jnp.finfo(jnp.float32).eps)
_EPS = 1.1  # of an eps of 1e-5: nearer than any default of another library (1e-6, 1e-3)


def _batch_argument(**changes: Function) -> Plant:
    return lambda: argument(functional, "batch_norm", **changes)


def _torch_argument(name: str, **changes: Function) -> Plant:
    return lambda: argument(torch_functional(), name, **changes)


def _remembering(make: Function) -> Plant:
    return lambda: replaced(RunningStats, "update", make)


def _follow_biased(running: RunningStats, found: Moments, momentum: float) -> RunningStats:
    channels = running.mean.shape
    return running.update(found.mean.reshape(channels), found.var.reshape(channels), momentum)


def _torch_biased(original: Function) -> Function:
    def faulty(
        x: "torch.Tensor", mean: "torch.Tensor", var: "torch.Tensor", *others: object
    ) -> "torch.Tensor":
        before = var.clone()
        y = original(x, mean, var, *others)
        count = x.numel() // x.shape[1]
        taken = var - 0.9 * before  # 0 in evaluation, where nothing is added
        # .data, for autograd holds on to the tensor.
        var.data += (var != before) * taken * ((count - 1) / count - 1)
        return y

    return faulty


def _unbiased(found: Moments) -> Moments:
    return found._replace(var=found.var * (found.size / (found.size - 1)))


def _eps_outside(
    x: Array, statistics: Moments, scale: Array, bias: Array, *, eps: float, dtype: object = None
) -> Array:
    del dtype
    shape = (1,) * (x.ndim - 1) + (-1,)
    y = statistics.center(x) / (jnp.sqrt(statistics.var) + eps)
    return y * scale.reshape(shape) + bias.reshape(shape)


def _constant_statistics(
    sets: Sets, eps: float, primals: _standardize.Arguments, tangents: _standardize.Arguments
) -> Array:
    """The tangent of the affine step alone."""
    x, found, _, scale, bias = primals
    dx, _, _, dscale, dbias = tangents
    found = _standardize._known(sets, x, found)
    return jax.jvp(
        lambda *parts: functional.normalize(parts[0], found, *parts[1:], eps=eps),
        (x, scale, bias), (dx, dscale, dbias),
    )[1]  # fmt: skip


def _torch_training(formula: Function) -> Plant:
    """Plants a formula of (mean, variance, count, eps) to (mean, divisor) in training."""

    def make(original: Function) -> Function:
        def faulty(
            x: "torch.Tensor",
            mean: "torch.Tensor",
            var: "torch.Tensor",
            weight: "torch.Tensor",
            bias: "torch.Tensor",
            training: bool,
            momentum: float,
            eps: float,
        ) -> "torch.Tensor":
            y = original(x, mean, var, weight, bias, training, momentum, eps)
            if not training:
                return y
            moments = x.mean((0, 2, 3), True), x.var((0, 2, 3), correction=0, keepdim=True)
            center, divisor = formula(*moments, x.numel() // x.shape[1], eps)
            return (x - center) / divisor * weight[:, None, None] + bias[:, None, None]

        return faulty

    return lambda: replaced(torch_functional(), "batch_norm", make)


def _torch_other_eps(original: Function) -> Function:
    """Evaluates with another eps."""

    def faulty(
        x: "torch.Tensor", mean: object, var: object, weight: object, bias: object,
        training: bool, momentum: float, eps: float,
    ) -> "torch.Tensor":  # fmt: skip
        used = eps if training else _EPS * eps
        return original(x, mean, var, weight, bias, training, momentum, used)

    return faulty


def _torch_uncounted() -> Plant:
    def make(original: Function) -> Function:
        def faulty(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
            before = layer.num_batches_tracked.clone()
            y = original(layer, x)
            layer.num_batches_tracked.copy_(before)
            return y

        return faulty

    def plant() -> Planted:
        from torch.nn.modules.batchnorm import _BatchNorm

        return replaced(_BatchNorm, "forward", make)

    return plant


def _torch_stale(**changes: Function) -> Plant:
    clone = lambda tensor: tensor.clone()  # noqa: E731
    return _torch_argument("batch_norm", running_mean=clone, running_var=clone, **changes)


def _moving(original: Function) -> Function:
    """Lets the running mean decay in evaluation."""

    def faulty(layer: _base.Tracked, x: Array, use: bool | None) -> Array | None:
        y = original(layer, x, use)
        if y is not None and layer.mean is not None:
            layer.mean[...] = 0.9 * layer.mean[...]
        return y

    return faulty


def _torch_moving(original: Function) -> Function:
    def faulty(layer: "torch.nn.BatchNorm2d", x: "torch.Tensor") -> "torch.Tensor":
        y = original(layer, x)
        if not layer.training:
            layer.running_mean.mul_(0.9)
        return y

    return faulty


def _torch_batch_norm_moving() -> Planted:
    from torch.nn.modules.batchnorm import _BatchNorm

    return replaced(_BatchNorm, "forward", _torch_moving)


_BATCH = [
    Fault(
        "statistics move in evaluation", "evaluation keeps the statistics", "batch norm",
        "after evaluation running_mean",
        lambda: replaced(_base.Tracked, "_evaluate", _moving),
        _torch_batch_norm_moving,
    ),
    Fault(
        "momentum sense", "momentum weighs the new value", "batch norm", "step 1 running_mean",
        lambda: argument(RunningStats, "update", momentum=lambda m: 1 - m),
        _torch_argument("batch_norm", momentum=lambda m: 1 - m),
    ),
    Fault(
        "momentum 0.11 for 0.1", "momentum has torch's value", "batch norm", "step 1 running_mean",
        _batch_argument(momentum=lambda m: 1.1 * m),
        _torch_argument("batch_norm", momentum=lambda m: 1.1 * m),
    ),
    Fault(
        "biased running variance", "the running variance follows the unbiased one", "batch norm",
        "step 1 running_var",
        lambda: replaced(_batch_norms, "follow", lambda _: _follow_biased),
        lambda: replaced(torch_functional(), "batch_norm", _torch_biased),
    ),
    Fault(
        "unbiased variance in the output", "a batch is divided by its biased deviation",
        "batch norm", "output",
        lambda: argument(_standardize, "normalize", statistics=_unbiased),
        _torch_training(lambda m, v, n, eps: (m, (v * n / (n - 1) + eps).sqrt())),
    ),
    Fault(
        "batch norm eps 1.1e-5", "eps has torch's value", "batch norm", "output",
        _batch_argument(eps=lambda eps: _EPS * eps),
        _torch_argument("batch_norm", eps=lambda eps: _EPS * eps),
    ),
    Fault(
        "eps outside the root", "eps is added to the variance", "batch norm", "output",
        lambda: replaced(_standardize, "normalize", lambda _: _eps_outside),
        _torch_training(lambda m, v, _, eps: (m, v.sqrt() + eps)),
    ),
    Fault(
        "stale statistics", "training moves the statistics", "batch norm", "step 1 running",
        _remembering(lambda _: lambda old, *_: old._replace(batches=old.batches + 1)),
        _torch_stale(),
    ),
    Fault(
        "batches not counted", "training counts batches", "batch norm", "step 1 num_batches",
        _remembering(lambda f: lambda old, *new: f(old, *new)._replace(batches=old.batches)),
        _torch_uncounted(),
    ),
    Fault(
        "evaluation by the batch", "evaluation uses the running statistics", "batch norm",
        "evaluation",
        lambda: result(_base.Tracked, "_evaluate", lambda _: None),
        _torch_stale(training=lambda _: True),
    ),
    Fault(
        "training by the running statistics", "training uses the batch", "batch norm", "output",
        lambda: argument(_base.Tracked, "_evaluate", use_running_average=lambda _: True),
        _torch_argument("batch_norm", training=lambda _: False),
    ),
    Fault(
        "eps 1.1e-5 in evaluation", "eps has torch's value", "batch norm", "evaluation",
        lambda: argument(functional, "batch_norm_inference", eps=lambda eps: _EPS * eps),
        lambda: replaced(torch_functional(), "batch_norm", _torch_other_eps),
    ),
    Fault(
        "no gradient of the scale", "the scale is learned", "batch norm", "grad weight",
        _batch_argument(scale=jax.lax.stop_gradient),
        _torch_argument("batch_norm", weight=lambda w: w.detach()),
    ),
    Fault(
        "statistics as constants", "gradients flow through the batch's statistics", "batch norm",
        "grad input",
        lambda: replaced(_standardize, "_by_channel", lambda _: _constant_statistics),
        _torch_training(lambda m, v, _, eps: (m.detach(), (v.detach() + eps).sqrt())),
    ),
]  # fmt: skip


def _over(*axes: int) -> Function:
    return lambda sets: dataclasses.replace(sets, axes=axes)


def _one_pass(x: Array, sets: Sets) -> Moments:
    mean = jnp.mean(x, sets.axes, keepdims=True)
    var = jnp.mean(x * x, sets.axes, keepdims=True) - mean * mean
    return Moments(mean, jnp.zeros_like(mean), var, x.size // mean.size)


def _torch_one_pass(
    x: "torch.Tensor", shape: object, weight: "torch.Tensor", bias: "torch.Tensor", eps: float
) -> "torch.Tensor":
    del shape
    mean = x.mean(-1, True)
    var = (x * x).mean(-1, True) - mean * mean
    return (x - mean) / (var + eps).sqrt() * weight + bias


def _torch_all_axes(
    x: "torch.Tensor", shape: object, weight: "torch.Tensor", bias: "torch.Tensor", eps: float
) -> "torch.Tensor":
    del shape
    mean, var = x.mean((1, 2), True), x.var((1, 2), correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * weight + bias


def _torch_over_batch(
    x: "torch.Tensor", mean: object, var: object, weight: object, bias: object,
    use_input_stats: bool, momentum: float, eps: float,
) -> "torch.Tensor":  # fmt: skip
    arguments = (x, mean, var, weight, bias, use_input_stats, momentum, eps)
    return torch_functional().batch_norm(*arguments)


def _interleaved(original: Function) -> Function:
    """Groups channels 0, 2, 4 and 1, 3, 5 instead of neighbours."""

    def faulty(x: Array, sets: Sets) -> Moments:
        order = jnp.arange(x.shape[-1]).reshape(-1, sets.groups).T.ravel()
        found = original(x[..., order], sets)
        back = jnp.argsort(order)
        shift, residual, var = (part[..., back] for part in found[:3])
        return Moments(shift, residual, var, found.size)

    return faulty


def _torch_interleaved(original: Function) -> Function:
    def faulty(
        x: "torch.Tensor", groups: int, weight: "torch.Tensor", bias: "torch.Tensor", eps: float
    ) -> "torch.Tensor":
        import torch

        order = torch.arange(x.shape[1]).reshape(-1, groups).T.ravel()
        y = original(x[:, order], groups, None, None, eps)[:, order.argsort()]
        return y * weight[:, None, None] + bias[:, None, None]

    return faulty


def _centred(original: Function) -> Function:
    """Subtracts the mean first, as layer normalisation does; the last axis is the features' one."""
    return lambda x, *others, **named: original(x - x.mean(-1, keepdims=True), *others, **named)


_SAMPLE = [
    Fault(
        "layer norm eps 1.1e-5", "eps has torch's value", "layer norm", "output",
        lambda: argument(functional, "layer_norm", eps=lambda eps: _EPS * eps),
        _torch_argument("layer_norm", eps=lambda eps: _EPS * eps),
    ),
    Fault(
        "layer norm without bias", "the bias is added", "layer norm", "output",
        lambda: argument(functional, "layer_norm", bias=lambda _: None),
        _torch_argument("layer_norm", bias=lambda _: None),
    ),
    Fault(
        "layer norm over all but the batch", "the trailing axis alone is normalised",
        "layer norm", "output",
        lambda: argument(_standardize, "local_moments", sets=_over(1, 2)),
        lambda: replaced(torch_functional(), "layer_norm", lambda _: _torch_all_axes),
    ),
    Fault(
        "one-pass variance", "an offset costs no digits", "layer norm, mean 100", "output",
        lambda: replaced(_standardize, "local_moments", lambda _: _one_pass),
        lambda: replaced(torch_functional(), "layer_norm", lambda _: _torch_one_pass),
    ),
    Fault(
        "rms norm eps of float32", "eps=None is the machine epsilon of the dtype", "rms norm",
        "output",
        lambda: argument(functional, "rms_norm", eps=lambda _: _FLOAT32),
        _torch_argument("rms_norm", eps=lambda _: _FLOAT32),
    ),
    Fault(
        "rms norm of centred values", "the mean stays in", "rms norm", "output",
        lambda: replaced(functional, "rms_norm", _centred),
        lambda: replaced(torch_functional(), "rms_norm", _centred),
    ),
    Fault(
        "rms norm without scale", "the scale is multiplied", "rms norm", "output",
        lambda: argument(functional, "rms_norm", scale=lambda _: None),
        _torch_argument("rms_norm", weight=lambda _: None),
    ),
    Fault(
        "group norm eps 1.1e-5", "eps has torch's value", "group norm", "output",
        lambda: argument(functional, "group_norm", eps=lambda eps: _EPS * eps),
        _torch_argument("group_norm", eps=lambda eps: _EPS * eps),
    ),
    Fault(
        "groups interleaved", "a group is neighbouring channels", "group norm", "output",
        lambda: replaced(_standardize, "local_moments", _interleaved),
        lambda: replaced(torch_functional(), "group_norm", _torch_interleaved),
    ),
    Fault(
        "instance norm over the batch", "every sample is normalised alone", "instance norm",
        "output",
        lambda: argument(_standardize, "local_moments", sets=_over(0, 1, 2)),
        lambda: replaced(torch_functional(), "instance_norm", lambda _: _torch_over_batch),
    ),
    Fault(
        "instance norm eps 1.1e-5", "eps has torch's value", "instance norm", "output",
        lambda: argument(functional, "instance_norm", eps=lambda eps: _EPS * eps),
        _torch_argument("instance_norm", eps=lambda eps: _EPS * eps),
    ),
]  # fmt: skip

NORMS = (*_BATCH, *_SAMPLE)
