"""Stochastic gradient descent with PyTorch's momentum."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import optax

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike
from flaxstab.optim._core import Options, Parts, transformation
from flaxstab.optim._hypers import Hyper, check_hypers, check_number, is_traced, is_zero
from flaxstab.optim._masks import Mask


class SgdState(NamedTuple):
    """State of :func:`sgd`.

    Attributes:
      count: how many updates there were; what schedules see.
      trace: PyTorch's ``momentum_buffer``, 0 before a parameter's first gradient; ``None`` without
        momentum.
      skipped: as of :class:`AdamState`.
    """

    count: Array  # type: ignore[assignment]  # optax's name hides a tuple's method
    trace: optax.Updates | None
    skipped: Array | None


class _Terms(NamedTuple):
    """The scalars of one step, in the dtype of the computation."""

    rate: Array
    momentum: Array
    weight: Array  # of the gradient in the buffer


def sgd(
    learning_rate: Hyper = 1e-3,
    momentum: float | Array = 0.0,
    dampening: float | Array = 0.0,
    weight_decay: Hyper = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    *,
    mask: Mask | None = None,
    state_dtype: DTypeLike | None = None,
    own_steps: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Returns stochastic gradient descent with PyTorch's update and defaults.

    Same result as ``torch.optim.SGD``: ``weight_decay`` times the parameter joins the gradient;
    the momentum buffer starts as the first gradient, which is not dampened; the learning rate
    multiplies the buffer, so that a change of it takes effect at once. A parameter whose gradient
    is ``None`` is left alone.

    Args:
      learning_rate: step size, at least 0; a number, a traced number or a schedule of the number
        of updates so far.
      momentum: the buffer's decay rate, at least 0; may be traced. The number 0 keeps no buffer.
      dampening: what the gradient loses before it joins the buffer, from the second on; may be
        traced.
      weight_decay: the factor of the L2 penalty ½Σθ², at least 0; a number, a traced number or a
        schedule.
      nesterov: whether to step by the gradient plus ``momentum`` times the new buffer.
      maximize: whether to climb; the penalty still pulls towards 0.
      mask: which parameters decay, as of :func:`adamw`.
      state_dtype: dtype of the buffer; ``None`` = each parameter's.
      own_steps: as of :func:`adamw`. Without dampening no step number matters, and gradients may be
        ``None`` all the same.

    Returns:
      An optax transformation. Its state is an :class:`SgdState`.

    Raises:
      ValueError: if a value is out of range while it is known, or ``nesterov`` is asked for without
        momentum or with dampening.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = sgd(0.5, momentum=0.5, dampening=0.5)
      >>> params, gradient = {"kernel": jnp.zeros(1)}, {"kernel": jnp.ones(1)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(gradient, state, params)
      ...     print(updates["kernel"].tolist(), state.trace["kernel"].tolist())
      [-0.5] [1.0]
      [-0.5] [1.0]

    Differs from:
      ``optax.sgd``, which has neither dampening nor weight decay.

    Reference:
      I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the Importance of Initialization and
      Momentum in Deep Learning", 2013 (ICML; equations 3 and 4, with the learning rate outside).
    """
    check_hypers(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    check_number("momentum", momentum)
    check_number("dampening", dampening)
    _check_momentum(momentum, dampening, nesterov)
    options = Options(learning_rate, weight_decay, mask, True, maximize, state_dtype, own_steps)
    if is_zero(momentum):
        state = functools.partial(SgdState, trace=None)
        parts = Parts(state, (), lambda rate, *_: rate, lambda rate, g: (-rate * g,), counts=False)
    else:
        terms = functools.partial(_terms, momentum, dampening)
        counts = not is_zero(dampening)  # only its first gradient is not dampened
        parts = Parts(SgdState, ("trace",), terms, functools.partial(_step, nesterov), counts)
    return transformation(parts, options)


def _check_momentum(momentum: float | Array, dampening: float | Array, nesterov: bool) -> None:
    undampened = is_traced(dampening) or float(dampening) == 0
    fits = (is_traced(momentum) or float(momentum) > 0) and undampened
    check(
        fits or not nesterov,
        "nesterov needs a momentum above 0 and a dampening of 0",
        momentum=momentum,
        dampening=dampening,
    )
    known = is_traced(dampening) or math.isfinite(float(dampening))
    check(known, "dampening must be a finite number", dampening=dampening)


def _terms(
    momentum: float | Array, dampening: float | Array, rate: Array, step: Array, wide: DTypeLike
) -> _Terms:
    weight = jnp.asarray(1 - dampening, wide)
    if not is_zero(dampening):
        # PyTorch begins with the whole gradient, and without momentum it keeps no buffer.
        whole = (step == 1) | (jnp.asarray(momentum, wide) == 0)
        weight = jnp.where(whole, jnp.ones_like(weight), weight)
    return _Terms(rate, jnp.asarray(momentum, wide), weight)


def _step(nesterov: bool, terms: _Terms, g: Array, buffer: Array) -> tuple[Array, Array]:
    """Returns the update and the new buffer."""
    buffer = terms.momentum * buffer + terms.weight * g
    direction = g + terms.momentum * buffer if nesterov else buffer
    return -terms.rate * direction, buffer
