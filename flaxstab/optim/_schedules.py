"""Learning-rate schedules with PyTorch's values, as optax schedules."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flaxstab._checks import check, known
from flaxstab._typing import Array, ArrayLike, DTypeLike

Number = float | Array  # a number or a traced scalar
Steps = int | Array

_ZEROED = -1e4  # a logarithm whose exponential is 0 in every dtype


def warmup_cosine(
    peak: Number, warmup_steps: Steps, total_steps: Steps, end: Number = 0.0
) -> optax.Schedule:
    """Returns a linear climb from 0 to ``peak``, then a half cosine down to ``end``.

    Same values as ``torch.optim.lr_scheduler.SequentialLR`` of a ``LambdaLR`` that climbs from 0
    and a ``CosineAnnealingLR(T_max=total_steps - warmup_steps, eta_min=end)``, up to the last
    step. After it the rate stays at ``end``; torch's cosine climbs again.

    Args:
      peak: the largest learning rate, reached after ``warmup_steps`` steps.
      warmup_steps: length of the climb in steps, at least 0.
      total_steps: length of the whole in steps, above ``warmup_steps``.
      end: the final learning rate.

    Returns:
      A function from the number of steps taken so far to the learning rate, in float32 (float64
      where JAX's x64 mode is on). The first step's rate is 0 if there is a warmup. A number below
      0 counts as 0.

    Raises:
      ValueError: if the steps do not fit, or a rate is negative, infinite or NaN.

    Example:
      >>> rate = warmup_cosine(0.1, warmup_steps=10, total_steps=110)
      >>> [round(float(rate(step)), 4) for step in (0, 5, 10, 60, 110, 1000)]
      [0.0, 0.05, 0.1, 0.05, 0.0, 0.0]

    Differs from:
      ``optax.warmup_cosine_decay_schedule``, whose float32 rates lose their digits near the end:
      the last of 100,000 is off by 100 %.

    Reference:
      I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2016,
      arXiv:1608.03983 (equation 5).
    """
    peak, end = _rates(peak=peak, end=end)
    first, last = known(warmup_steps, "warmup_steps"), known(total_steps, "total_steps")
    check(
        (first is None or (_whole(warmup_steps) and first >= 0))
        and (last is None or (_whole(total_steps) and last >= 1))
        and (first is None or last is None or first < last),
        "warmup_steps and total_steps must be integers with 0 <= warmup_steps < total_steps",
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    warmup_steps = warmup_steps if first is None else int(first)
    total_steps = total_steps if last is None else int(last)

    def schedule(count: ArrayLike) -> Array:
        step, wide = _signed(count), _wide()
        climb, total = (jnp.asarray(n, step.dtype) for n in (warmup_steps, total_steps))
        # The steps left are counted as integers: float32 knows none above 2**24.
        left = jnp.clip(total - step, 0, total - climb)
        climbed = jnp.asarray(step, wide) / jnp.asarray(jnp.maximum(climb, 1), wide)
        cosine = _half_cosine(end, peak, left, total_steps - warmup_steps)
        return jnp.where(step < climb, jnp.asarray(peak, wide) * climbed, cosine)

    return schedule


def cosine_annealing(base: Number, T_max: Steps, eta_min: Number = 0.0) -> optax.Schedule:  # noqa: N803
    """Returns half cosines between ``base`` and ``eta_min``, each ``T_max`` steps long.

    Same values as ``torch.optim.lr_scheduler.CosineAnnealingLR``: down to ``eta_min`` at
    ``T_max``, and from there up again, to ``base`` at ``2 * T_max``. A run longer than ``T_max``
    steps thus ends with a rising rate; :func:`warmup_cosine` stays down.

    Args:
      base: the learning rate at step 0.
      T_max: length of the way down in steps, at least 1.
      eta_min: the learning rate at ``T_max``.

    Returns:
      A schedule of the steps taken so far, as from :func:`warmup_cosine`.

    Raises:
      ValueError: if ``T_max`` is no such integer, or a rate is negative, infinite or NaN.

    Example:
      >>> rate = cosine_annealing(0.1, T_max=100)
      >>> [round(float(rate(step)), 4) for step in (0, 50, 100, 150, 200)]
      [0.1, 0.05, 0.0, 0.05, 0.1]

    Differs from:
      ``optax.cosine_decay_schedule``, which stays at the end.

    Reference:
      I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2016,
      arXiv:1608.03983 (equation 5, without the restarts).
    """
    base, eta_min = _rates(base=base, eta_min=eta_min)
    (T_max,) = _lengths(T_max=T_max)  # noqa: N806

    def schedule(count: ArrayLike) -> Array:
        step = _signed(count)
        length = jnp.asarray(T_max, step.dtype)
        left = jnp.abs(length - step % (2 * length))  # steps to the nearest bottom
        return _half_cosine(eta_min, base, left, T_max)

    return schedule


def linear_warmup(base: Number, warmup_steps: Steps, start_factor: Number) -> optax.Schedule:
    """Returns a linear climb from ``start_factor * base`` to ``base``, which then stays.

    Same values as ``torch.optim.lr_scheduler.LinearLR(start_factor=start_factor,
    total_iters=warmup_steps)``, whose defaults are 1/3 and 5. To go on with another schedule
    join them, as ``SequentialLR`` does:
    ``optax.join_schedules([linear_warmup(...), cosine_annealing(...)], [warmup_steps])``.

    Args:
      base: the learning rate after ``warmup_steps`` steps.
      warmup_steps: length of the climb in steps, at least 1.
      start_factor: what of ``base`` the first step takes, in [0, 1].

    Returns:
      A schedule of the steps taken so far, as from :func:`warmup_cosine`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> rate = linear_warmup(0.1, warmup_steps=4, start_factor=0.5)
      >>> [round(float(rate(step)), 4) for step in (0, 2, 4, 100)]
      [0.05, 0.075, 0.1, 0.1]

    Differs from:
      ``LinearLR``, which refuses ``start_factor=0``, and with ``total_iters=0`` stays at
      ``start_factor * base`` for good; that is refused here.
    """
    (base,) = _rates(base=base)
    (warmup_steps,) = _lengths(warmup_steps=warmup_steps)
    (start_factor,) = _parts(start_factor=start_factor)

    def schedule(count: ArrayLike) -> Array:
        step, wide = _signed(count), _wide()
        done = jnp.asarray(jnp.minimum(step, jnp.asarray(warmup_steps, step.dtype)), wide)
        part = done / jnp.asarray(warmup_steps, wide)
        start = jnp.asarray(start_factor, wide)
        return jnp.asarray(base, wide) * (start + (1 - start) * part)

    return schedule


def step(base: Number, step_size: Steps, gamma: Number = 0.1) -> optax.Schedule:
    """Returns a learning rate that is multiplied by ``gamma`` after every ``step_size`` steps.

    Same values as ``torch.optim.lr_scheduler.StepLR``; with ``step_size=1`` as ``ExponentialLR``.

    Args:
      base: the learning rate of the first ``step_size`` steps.
      step_size: length of each plateau in steps, at least 1.
      gamma: the factor from one plateau to the next, at least 0.

    Returns:
      A schedule of the steps taken so far, as from :func:`warmup_cosine`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> rate = step(0.1, step_size=30)
      >>> [round(float(rate(count)), 5) for count in (0, 29, 30, 60)]
      [0.1, 0.1, 0.01, 0.001]
    """
    base, gamma = _rates(base=base, gamma=gamma)
    (step_size,) = _lengths(step_size=step_size)

    def schedule(count: ArrayLike) -> Array:
        taken, wide = _signed(count), _wide()
        drops = jnp.asarray(taken // jnp.asarray(step_size, taken.dtype), wide)
        # Not gamma**drops: 100,000 powers of float32's 0.9999 are off by 0.2 %.
        return jnp.asarray(base, wide) * jnp.exp(drops * jnp.asarray(_log(gamma), wide))

    return schedule


def one_cycle(
    max_lr: Number,
    total_steps: Steps,
    pct_start: Number = 0.3,
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
) -> optax.Schedule:
    """Returns a half cosine up to ``max_lr`` and another one down, far below the start.

    Same values as ``torch.optim.lr_scheduler.OneCycleLR(cycle_momentum=False)`` for each of its
    steps 0 to ``total_steps - 1``: it begins at ``max_lr / div_factor``, has its peak at
    ``pct_start * total_steps - 1``, which need not be a whole number, and its last step takes
    ``max_lr / div_factor / final_div_factor``.

    Args:
      max_lr: the peak.
      total_steps: length of the run in steps, at least 1.
      pct_start: the part of the run that climbs, in [0, 1].
      div_factor: the peak divided by the first rate, above 0.
      final_div_factor: the first rate divided by the last, above 0.

    Returns:
      A schedule of the steps taken so far, as from :func:`warmup_cosine`. After the run
      it stays at the last rate.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> rate = one_cycle(0.1, total_steps=100)
      >>> [round(float(rate(step)), 4) for step in (0, 29, 64, 99)]
      [0.004, 0.1, 0.05, 0.0]

    Differs from:
      ``OneCycleLR``, which by default cycles the momentum as well, climbs again at step
      ``total_steps``, raises behind it, and divides by zero where ``pct_start * total_steps`` is
      1. ``optax.cosine_onecycle_schedule`` has its peak at ``int(pct_start * total_steps)`` and
      its end at ``total_steps``, a step later than torch.

    Reference:
      L. Smith, N. Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
      Learning Rates", 2017, arXiv:1708.07120.
    """
    (max_lr,) = _rates(max_lr=max_lr)
    (total_steps,) = _lengths(total_steps=total_steps)
    (pct_start,) = _parts(pct_start=pct_start)
    factors = {"div_factor": div_factor, "final_div_factor": final_div_factor}
    div_factor, final_div_factor = _checked(
        lambda factor: 0 < factor < math.inf, "be finite and above 0", **factors
    )

    def schedule(count: ArrayLike) -> Array:
        step, wide = _signed(count), _wide()
        last = jnp.asarray(total_steps - 1, step.dtype)
        step = jnp.minimum(step, last)
        first = _float(max_lr) / _float(div_factor)
        peak = _float(pct_start) * _float(total_steps) - 1
        up = _half_cosine(first, max_lr, step, _or_one(peak))
        fall = _or_one(_float(total_steps) - 1 - peak)
        down = _half_cosine(first / _float(final_div_factor), max_lr, last - step, fall)
        climbs = (peak > 0) & (jnp.asarray(step, wide) <= jnp.asarray(peak, wide))
        return jnp.where(climbs, up, down)

    return schedule


def document_schedule(
    base: Number, warmup: Steps, steps_per_epoch: Steps, epochs: Steps
) -> optax.Schedule:
    """Returns the learning rate of document 2's training loop as it is printed.

    Same values as ``torch_ref.training.learning_rate_trace``, which drives torch's own scheduler:
    the warmup writes ``base * step / warmup`` before each step, counted from 1 and below
    ``warmup``; after each epoch ``CosineAnnealingLR(T_max=epochs)`` multiplies what it finds. The
    cosine therefore starts from what the warmup wrote last, and not from what the cosine would be
    by then: with 500 steps of warmup and 10 epochs of 120 steps the rate stays 1.52 times above
    ``base`` times the cosine over epochs. :func:`warmup_cosine` is the schedule that is meant.

    Args:
      base: the learning rate that the warmup climbs to.
      warmup: length of the warmup in steps, at least 0.
      steps_per_epoch: steps in each epoch, at least 1.
      epochs: length of the run in epochs, at least 1.

    Returns:
      A schedule of the steps taken so far, as from :func:`warmup_cosine`. After the run
      it is 0, as the scheduler leaves it.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> rate = document_schedule(0.1, warmup=4, steps_per_epoch=5, epochs=2)
      >>> [round(float(rate(step)), 4) for step in (0, 1, 2, 3, 4, 5, 9, 10)]
      [0.025, 0.05, 0.075, 0.075, 0.075, 0.0375, 0.0375, 0.0]
    """
    (base,) = _rates(base=base)
    steps_per_epoch, epochs = _lengths(steps_per_epoch=steps_per_epoch, epochs=epochs)
    (warmup,) = _lengths(0, warmup=warmup)

    def schedule(count: ArrayLike) -> Array:
        step, wide = _signed(count), _wide()
        size, total, climb = (jnp.asarray(n, step.dtype) for n in (steps_per_epoch, epochs, warmup))
        # Counted from 0, the steps below warmup - 1 write; the last of them is warmup - 2.
        written = jnp.asarray(jnp.minimum(step + 1, climb - 1), wide)
        climbed = jnp.where(climb > 1, written / jnp.asarray(jnp.maximum(climb, 1), wide), 1)
        epochs_left = total - jnp.minimum(step // size, total)
        left_then = total - jnp.clip((climb - 2) // size, 0, total - 1)
        now, then = (_half_cosine(0.0, 1.0, left, epochs) for left in (epochs_left, left_then))
        cosine = jnp.where(step < climb - 1, 1, now / then)
        return jnp.asarray(base, wide) * climbed * cosine

    return schedule


def _half_cosine(low: Number, high: Number, left: Array, length: Number) -> Array:
    """Returns ``low`` where nothing is left, ``high`` where all of ``length`` is."""
    wide = _wide()
    quarter = jnp.asarray(math.pi / 2 / _float(length), wide)
    # sin² instead of (1 + cos) / 2: the same number without cancellation near the end.
    half = jnp.square(jnp.sin(jnp.asarray(left, wide) * quarter))
    return jnp.asarray(low, wide) + jnp.asarray(_float(high) - _float(low), wide) * half


def _float(number: Number) -> Number:
    """Returns a known number with all its digits, a traced one in the dtype of learning rates."""
    value = known(number)
    return jnp.asarray(number, _wide()) if value is None else value


def _wide() -> DTypeLike:
    """Returns the dtype of learning rates: float32, or float64 in JAX's x64 mode."""
    return jnp.result_type(float)


def _signed(count: ArrayLike) -> Array:
    """Returns a number of steps, at least 0, that can be subtracted from.

    ``nnx.Optimizer`` counts unsigned.
    """
    steps = jnp.asarray(count)
    is_float = jnp.issubdtype(steps.dtype, jnp.floating)
    return jnp.maximum(steps if is_float else jnp.asarray(steps, jnp.result_type(int)), 0)


def _log(factor: Number) -> Number:
    value = known(factor)
    if value is None:
        return jnp.maximum(jnp.log(_float(factor)), _ZEROED)
    return math.log(value) if value > 0 else _ZEROED


def _or_one(length: Number) -> Number:
    """Returns a length to divide by: of a part without steps nothing is looked at."""
    return jnp.where(length > 0, length, 1) if isinstance(length, jax.Array) else length or 1.0


def _checked(valid: Callable[[float], bool], rule: str, **given: Number) -> tuple[Number, ...]:
    """Returns what is known as Python numbers, checked; traced values pass."""
    found: list[Number] = []
    for name, value in given.items():
        plain = known(value, name)
        check(plain is None or valid(plain), f"{name} must {rule}", fix="", **{name: value})
        found.append(value if plain is None else plain)
    return tuple(found)


def _rates(**rates: Number) -> tuple[Number, ...]:
    return _checked(lambda rate: 0 <= rate < math.inf, "be finite and at least 0", **rates)


def _parts(**parts: Number) -> tuple[Number, ...]:
    return _checked(lambda part: 0 <= part <= 1, "lie in [0, 1]", **parts)


def _lengths(minimum: int = 1, **steps: Steps) -> tuple[Steps, ...]:
    """Returns numbers of steps as Python integers; traced ones pass."""
    found: list[Steps] = []
    for name, value in steps.items():
        plain = known(value, name)
        valid = plain is None or (_whole(value) and plain >= minimum)
        check(valid, f"{name} must be an integer of at least {minimum}", fix="", **{name: value})
        found.append(value if plain is None else int(plain))
    return tuple(found)


def _whole(number: Number) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(number), jnp.integer))
