"""Learning-rate schedules with PyTorch's values, as optax schedules."""

import math

import jax
import jax.numpy as jnp
import optax

from flaxstab._checks import check
from flaxstab._typing import Array


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
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
      where JAX's x64 mode is on). The first step's rate is 0 if there is a warmup.

    Raises:
      ValueError: if the steps do not fit.

    Example:
      >>> rate = warmup_cosine(0.1, warmup_steps=10, total_steps=110)
      >>> [round(float(rate(step)), 4) for step in (0, 5, 10, 60, 110, 1000)]
      [0.0, 0.05, 0.1, 0.05, 0.0, 0.0]

    Reference:
      I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2016,
      arXiv:1608.03983 (equation 5).
    """
    known = not any(isinstance(n, jax.core.Tracer) for n in (warmup_steps, total_steps))
    check(
        not known or 0 <= warmup_steps < total_steps,
        "warmup_steps must be at least 0 and below total_steps",
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )

    def schedule(count: Array) -> Array:
        # The steps left are counted as integers: float32 knows none above 2**24.
        step, wide = jnp.asarray(count), jnp.result_type(float)
        left = jnp.asarray(jnp.clip(total_steps - step, 0, total_steps - warmup_steps), wide)
        # sin² instead of (1 + cos) / 2: the same number without cancellation near the end.
        half = jnp.square(jnp.sin(left * (math.pi / 2 / (total_steps - warmup_steps))))
        cosine = end + (peak - end) * half
        climbed = jnp.asarray(step, wide) / jnp.maximum(warmup_steps, 1)
        return jnp.where(step < warmup_steps, peak * climbed, cosine)

    return schedule
