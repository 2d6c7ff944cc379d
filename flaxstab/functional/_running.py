"""What batch and instance normalisation remember for evaluation."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxstab._dtypes import widest
from flaxstab._typing import Array, Float, Int
from flaxstab.functional._moments import Moments


class RunningStats(NamedTuple):
    """What batch and instance normalisation remember for evaluation.

    Attributes:
      mean: running mean, shape ``(C,)``.
      var: running *unbiased* variance, shape ``(C,)``.
      batches: how many batches have been seen, an integer scalar.
    """

    mean: Float[Array, " c"]
    var: Float[Array, " c"]
    batches: Int[Array, ""]

    def update(self, mean: Array, unbiased_var: Array, momentum: float | None) -> "RunningStats":
        """Moves the statistics towards a new batch's, as ``torch.nn.BatchNorm2d`` does.

        Args:
          mean: the batch's mean, shape ``(C,)``.
          unbiased_var: the batch's unbiased variance, shape ``(C,)``.
          momentum: weight of the new value; ``None`` averages over all batches so far.

        Returns:
          New statistics in the old ones' dtypes. Channels where ``mean`` or ``unbiased_var`` is
          undefined are the caller's business.
        """
        batches = self.batches + 1
        dtype = widest(self.mean.dtype, mean.dtype)
        weight = (
            1 / jnp.asarray(batches, dtype) if momentum is None else jnp.asarray(momentum, dtype)
        )

        def step(old: Array, new: Array) -> Array:
            blend = (1 - weight) * jnp.asarray(old, dtype) + weight * jnp.asarray(new, dtype)
            return jnp.asarray(blend, old.dtype)

        return RunningStats(step(self.mean, mean), step(self.var, unbiased_var), batches)


def follow(running: RunningStats, found: Moments, momentum: float | None) -> RunningStats:
    """Updates running statistics, except in channels with fewer than two values."""
    channels = running.mean.shape
    wide = found.var.dtype
    count = jnp.broadcast_to(jnp.asarray(found.size, wide), found.var.shape).reshape(channels)
    unbiased = found.var.reshape(channels) * (count / jnp.maximum(count - 1, 1))
    new = running.update(found.mean.reshape(channels), unbiased, momentum)
    enough = count >= 2
    return RunningStats(
        jnp.where(enough, new.mean, running.mean),
        jnp.where(enough, new.var, running.var),
        new.batches,
    )


# Compiled, so that a call outside jit does not build the loop anew each time.
@partial(jax.jit, inline=True)
def follow_each(running: RunningStats, found: Moments, momentum: float | None) -> RunningStats:
    """Updates running statistics by one batch after the other, along the first axis of moments."""

    def step(running: RunningStats, batch: Moments) -> tuple[RunningStats, None]:
        return follow(running, batch, momentum), None

    sizes = jnp.broadcast_to(jnp.asarray(found.size, found.var.dtype), found.var.shape)
    return jax.lax.scan(step, running, found._replace(size=sizes))[0]
