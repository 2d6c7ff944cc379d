"""Faults of Adam and AdamW."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
import optax

from flaxstab._typing import Array, DTypeLike
from flaxstab.optim import _adam, _core
from flaxstab.parity._selftest import _cases_training as cases
from flaxstab.parity._selftest._faults_clip import CLIP
from flaxstab.parity._selftest._faults_sgd import SGD
from flaxstab.parity._selftest._plant import (
    Fault,
    Function,
    Plant,
    Planted,
    argument,
    replaced,
    result,
    told,
)

if TYPE_CHECKING:
    import torch

_BETAS, _EPS = (0.9, 0.999), 1e-8  # of every case, by default
_FOREVER = 10**9  # steps, after which bias correction is 1


def leaf_update(change: Function) -> Plant:
    """Plants a change of an update, a function of (update, parameter, rate, decay)."""

    def make(original: Function) -> Function:
        def faulty(
            parts: object, options: object, scalars: Function, step: Array, decays: bool, g: Array,
            p: Array, *moments: Array,
        ) -> tuple[Array, ...]:  # fmt: skip
            bare, *kept = original(parts, options, scalars, step, False, g, p, *moments)
            rate, decay, _ = scalars(step, p.dtype)
            return change(bare, p, rate, decay if decays else 0.0), *kept

        return faulty

    return lambda: replaced(_core, "_step_leaf", make)


def _direction(formula: Function) -> Plant:
    """Plants a divisor, a function of (second moments, its correction, the largest before)."""

    def make(original: Function) -> Function:
        def faulty(
            short: bool, terms: _adam._Terms, g: Array, m: Array, v: Array, *peak: Array
        ) -> tuple[Array, ...]:
            _, m, v, *_ = original(short, terms, g, m, v, *peak)
            divisor, *kept = formula(v, terms.root**2, *peak)
            return -terms.rate * m / divisor, m, v, *kept

        return faulty

    return lambda: replaced(_adam, "_step", make)


def _scalars(**changes: Function) -> Plant:
    """Plants a change of what Adam's scalars are computed from."""
    return lambda: argument(_adam, "_terms", **changes)


def torch_adam(make: Function) -> Plant:
    """Plants a change of one step on lists of parameters, gradients, moments and step counts."""

    def plant() -> Planted:
        return replaced(import_module("torch.optim.adam"), "_single_tensor_adam", make)

    return plant


def torch_adam_argument(**changes: Function) -> Plant:
    def plant() -> Planted:
        return argument(import_module("torch.optim.adam"), "_single_tensor_adam", **changes)

    return plant


def torch_update(change: Function, **without: float) -> Plant:
    """Plants a change of parameters, a function of (before, after, rate, decay)."""

    def make(original: Function) -> Function:
        def faulty(params: "list[torch.Tensor]", *lists: object, **options: float) -> None:
            before = [p.clone() for p in params]
            original(params, *lists, **{**options, **without})
            for old, p in zip(before, params, strict=True):
                p.copy_(change(old, p.clone(), options["lr"], options["weight_decay"]))

        return faulty

    return torch_adam(make)


def _torch_corrected(steps: int) -> Plant:
    """Plants a bias correction by another number of steps."""

    def make(original: Function) -> Function:
        def faulty(
            params: object, grads: object, m: object, v: object, peaks: object,
            counts: "list[torch.Tensor]", *others: object, **options: object,
        ) -> None:  # fmt: skip
            later = [count.double() + steps for count in counts]
            original(params, grads, m, v, peaks, later, *others, **options)
            for count in counts:
                count.add_(1)

        return faulty

    return torch_adam(make)


def _torch_direction(formula: Function) -> Plant:
    """Plants a divisor, a function of (second moments, correction, largest before or None)."""

    def make(original: Function) -> Function:
        def faulty(
            params: "list[torch.Tensor]", grads: object, m: "list[torch.Tensor]",
            v: "list[torch.Tensor]", peaks: "list[torch.Tensor]", counts: "list[torch.Tensor]",
            *others: object, lr: float, weight_decay: float, **options: object,
        ) -> None:  # fmt: skip
            before, largest = [p.clone() for p in params], [peak.clone() for peak in peaks]
            options |= {"lr": lr, "weight_decay": weight_decay}
            original(params, grads, m, v, peaks, counts, *others, **options)
            for i, p in enumerate(params):
                first, second = (1 - beta ** float(counts[i]) for beta in _BETAS)
                divisor, *peak = formula(v[i], second, *largest[i : i + 1])
                p.copy_(before[i] * (1 - lr * weight_decay) - lr * (m[i] / first) / divisor)
                for kept, new in zip(peaks[i : i + 1], peak, strict=True):
                    kept.copy_(new)

        return faulty

    return torch_adam(make)


def _inside(v: "Array | torch.Tensor", correction: float) -> tuple[object]:
    return ((v / correction + _EPS) ** 0.5,)


def _coarse_log(hypers: _adam._Hypers) -> _adam._Hypers:
    """Takes the correction's beta2 as float32 has it: 1 - beta2**t loses 4 of its 7 digits."""
    log = jnp.log(jnp.asarray(_BETAS[1], jnp.float32))
    return hypers._replace(second=hypers.second._replace(log=log))


def _coarse(original: Function) -> Function:
    def faulty(hypers: _adam._Hypers, rate: Array, step: Array, wide: DTypeLike) -> _adam._Terms:
        given = _coarse_log(hypers) if jnp.dtype(wide) == jnp.float32 else hypers
        return original(given, rate, step, wide)

    return faulty


def _torch_coarse(v: "torch.Tensor", correction: float) -> "tuple[torch.Tensor]":
    if v.dtype.itemsize == 4:
        steps = round(math.log1p(-correction) / math.log(_BETAS[1]))
        correction = 1 - float(np.float32(_BETAS[1])) ** steps
    return ((v / correction) ** 0.5 + _EPS,)


@contextmanager
def _twice_counted() -> Iterator[None]:
    """Counts two for each step, and corrects by half the count."""
    with (
        result(optax, "safe_increment", lambda count: count + 1),
        argument(_adam, "_terms", step=lambda step: step // 2),
    ):
        yield


def _torch_twice_counted(original: Function) -> Function:
    def faulty(
        params: object, grads: object, m: object, v: object, peaks: object,
        counts: "list[torch.Tensor]", *others: object, **options: object,
    ) -> None:  # fmt: skip
        steps = [count / 2 for count in counts]
        original(params, grads, m, v, peaks, steps, *others, **options)
        for count in counts:
            count.add_(2)

    return faulty


def _low_moments(stepped: tuple[Array, ...]) -> tuple[Array, ...]:
    """Keeps what a float32 run remembers in bfloat16."""
    update, *moments = stepped
    if update.dtype != jnp.float32:
        return stepped
    return update, *(m.astype(jnp.bfloat16).astype(m.dtype) for m in moments)


def _torch_low_moments(original: Function) -> Function:
    def faulty(
        params: object, grads: object, m: "list[torch.Tensor]", v: "list[torch.Tensor]",
        *others: object, **options: object,
    ) -> None:  # fmt: skip
        original(params, grads, m, v, *others, **options)
        for moment in (a for a in (*m, *v) if a.dtype.itemsize == 4):
            moment.copy_(moment.bfloat16())

    return faulty


def _largest_corrected(v: Array, correction: Array, before: Array) -> tuple[Array, Array]:
    peak = jnp.maximum(before, v / correction)
    return peak**0.5 + _EPS, peak


def _torch_largest_corrected(
    v: "torch.Tensor", correction: float, before: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    peak = (v / correction).maximum(before)
    return peak**0.5 + _EPS, peak


def _torch_forgotten(original: Function) -> Function:
    def faulty(
        params: object, grads: object, m: object, v: object, peaks: "list[torch.Tensor]",
        *others: object, **options: object,
    ) -> None:  # fmt: skip
        for peak in peaks:
            peak.zero_()
        original(params, grads, m, v, peaks, *others, **options)

    return faulty


_ADAM = [
    Fault(
        "L2 for decoupled decay", "decay does not pass through the moments", "adamw", "exp_avg",
        told(_adam, coupled=True),
        torch_adam_argument(decoupled_weight_decay=lambda _: False),
    ),
    Fault(
        "decay behind the step", "decay comes first", "adamw", "update",
        leaf_update(lambda u, p, rate, decay: u - rate * decay * (p + u)),
        torch_update(lambda _, p, lr, decay: p * (1 - lr * decay), weight_decay=0.0),
    ),
    Fault(
        "no bias correction", "moments are corrected", "adamw", "update",
        _scalars(step=lambda step: jnp.full_like(step, _FOREVER)),
        _torch_corrected(_FOREVER),
    ),
    Fault(
        "bias correction one step late", "the first step is step 1", "adamw", "update",
        _scalars(step=lambda step: step + 1),
        _torch_corrected(1),
    ),
    Fault(
        "update of the wrong sign", "the loss falls", "adamw", "update",
        leaf_update(lambda u, p, rate, decay: -(u - rate * decay * p)),
        torch_update(lambda old, p, *_: 2 * old - p),
    ),
    Fault(
        "no update", "a step moves the parameters", "adamw", "update",
        leaf_update(lambda u, *_: jnp.zeros_like(u)),
        torch_update(lambda old, *_: old),
    ),
    Fault(
        "Adam's eps inside the root", "eps is added to the root", "adamw", "update",
        _direction(_inside),
        _torch_direction(_inside),
    ),
    Fault(
        "Adam's eps 1.1e-8", "eps has torch's value", "adamw", "update",
        _scalars(hypers=lambda h: h._replace(eps=1.1 * h.eps)),
        torch_adam_argument(eps=lambda eps: 1.1 * eps),
    ),
    Fault(
        "steps counted twice", "the state counts steps", "adamw", "step",
        _twice_counted,
        torch_adam(_torch_twice_counted),
    ),
    Fault(
        "correction by float32's beta2", "1 - beta2**t does not cancel", "adamw, float32",
        "update",
        lambda: replaced(_adam, "_terms", _coarse),
        _torch_direction(_torch_coarse),
    ),
    Fault(
        "moments in bfloat16", "moments have the parameter's dtype", "adamw, float32", "exp_avg",
        lambda: result(_core, "_step_leaf", _low_moments),
        torch_adam(_torch_low_moments),
    ),
    Fault(
        "beta2 0.9991 for 0.999", "beta2 has torch's value", "adamw", "exp_avg_sq",
        _scalars(hypers=lambda h: h._replace(second=_adam._decay_rate(0.9991))),
        torch_adam_argument(beta2=lambda _: 0.9991),
    ),
    Fault(
        "largest corrected moment", "amsgrad's maximum is of uncorrected moments",
        "adamw, amsgrad", "max_exp_avg_sq",
        _direction(_largest_corrected),
        _torch_direction(_torch_largest_corrected),
    ),
    Fault(
        "bias decayed", "the mask exempts biases", "adamw, masked", "update 1",
        lambda: argument(_core, "_step_leaf", decays=lambda _: True),
        torch_adam_argument(weight_decay=lambda _: cases.DECAY),
    ),
    Fault(
        "decoupled decay for L2", "L2 passes through the moments", "adam, climbing", "exp_avg",
        told(_adam, coupled=False),
        torch_adam_argument(decoupled_weight_decay=lambda _: True),
    ),
    Fault(
        "maximize ignored by Adam", "maximize climbs", "adam, climbing", "exp_avg",
        told(_adam, maximize=False),
        torch_adam_argument(maximize=lambda _: False),
    ),
    Fault(
        "largest moment forgotten", "amsgrad remembers the largest moment", "adam, climbing",
        "max_exp_avg_sq",
        lambda: argument(_adam, "_step", peak=jnp.zeros_like),
        torch_adam(_torch_forgotten),
    ),
]  # fmt: skip


OPTIM = (*_ADAM, *SGD, *CLIP)
