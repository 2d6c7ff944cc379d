"""Batch normalisation that no longer changes."""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab import functional
from flaxstab._checks import check_eps, check_last_axis, check_positive
from flaxstab._dtypes import floating
from flaxstab._typing import Array, DTypeLike
from flaxstab.functional import RunningStats


class FrozenBatchNorm(nnx.Module):
    """Normalises every channel by fixed statistics, in training and evaluation alike.

    Same result as ``torchvision.ops.FrozenBatchNorm2d`` at any rank, and as
    :class:`BatchNorm` in evaluation. ``mean``, ``var``, ``scale`` and ``bias`` are all
    ``nnx.BatchStat``: an ``nnx.Optimizer(wrt=nnx.Param)`` does not see them, neither
    ``model.train()`` nor ``nnx.view`` thaws them, and gradients reach the input alone. A filter
    that asks for them all the same (``wrt=nnx.BatchStat``) gets gradients of 0.

    Args:
      num_features: size ``C`` of the input's last axis.
      eps: added to the variance.
      dtype: dtype of the output; ``None`` = the input's.
      param_dtype: dtype of all four arrays, shape ``(C,)``.
      rngs: accepted like every layer's; nothing is drawn.

    Raises:
      ValueError: if an option is out of range or the input's last axis is not ``num_features``.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = FrozenBatchNorm(2, eps=0.0)
      >>> layer.mean[...] = jnp.array([1.0, 2.0])
      >>> layer(jnp.array([[1.0, 1.0]])).tolist()
      [[0.0, -1.0]]

    Differs from:
      ``torchvision.ops.FrozenBatchNorm2d``, which folds ``weight / sqrt(var + eps)`` and
      ``bias - mean * that`` before it sees the input and so loses digits at large means.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs
        check_positive(num_features=num_features)
        check_eps(eps)
        self.num_features = num_features
        self.eps = eps
        self.dtype = None if dtype is None else floating("dtype", dtype)
        # The mode that model.train() and model.eval() set: kept for whoever unfreezes the layer.
        self.use_running_average = False
        shape, param_dtype = (num_features,), floating("param_dtype", param_dtype)
        self.scale = nnx.BatchStat(jnp.ones(shape, param_dtype))
        self.bias = nnx.BatchStat(jnp.zeros(shape, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(shape, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(shape, param_dtype))

    def __call__(
        self, x: Array, *, use_running_average: bool | None = None, mask: Array | None = None
    ) -> Array:
        """Normalises ``(*batch, C)``.

        Args:
          x: values, the last axis of size ``num_features``.
          use_running_average: accepted as by :class:`BatchNorm`; changes nothing.
          mask: likewise: every value is normalised.

        Returns:
          An array of the shape of ``x``.
        """
        del use_running_average, mask
        check_last_axis("num_features", self.num_features, x.shape)
        scale, bias, mean, var = jax.lax.stop_gradient(
            (self.scale[...], self.bias[...], self.mean[...], self.var[...])
        )
        running = RunningStats(mean, var, jnp.zeros((), jnp.int32))
        return functional.batch_norm_inference(
            x, running, scale, bias, eps=self.eps, dtype=self.dtype
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Accepts the mode, for ``nnx.view``; it changes no result.

        Args:
          use_running_average: the mode that the layer would have if it were unfrozen.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
