"""What norms share: affine parameters, and running statistics with the mode of their use."""

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional
from flaxstab._checks import check, check_eps, check_positive
from flaxstab._dtypes import floating
from flaxstab._typing import Array, DTypeLike, Shape
from flaxstab.functional import RunningStats


class Affine(nnx.Module):
    """Holds what every norm holds: an optional scale, an optional bias, eps and the dtype."""

    def __init__(
        self,
        shape: Shape,
        eps: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        *,
        scale: bool,
        bias: bool,
    ) -> None:
        check_eps(eps)
        self.eps = eps
        self.dtype = None if dtype is None else floating("dtype", dtype)
        param_dtype = floating("param_dtype", param_dtype)
        self.scale = nnx.data(nnx.Param(jnp.ones(shape, param_dtype)) if scale else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros(shape, param_dtype)) if scale and bias else None)

    def _parameters(self) -> tuple[Array | None, Array | None]:
        scale = None if self.scale is None else self.scale[...]
        return scale, None if self.bias is None else self.bias[...]


class Tracked(Affine):
    """Holds running statistics in ``mean``, ``var``, ``count`` and the mode of their use."""

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        *,
        affine: bool,
        bias: bool,
        track: bool,
    ) -> None:
        check_positive(num_features=num_features)
        check(
            momentum is None or 0 <= momentum <= 1,
            "momentum must lie in [0, 1] or be None",
            fix="It weighs the new value: Flax's 0.99 is PyTorch's 0.01.",
            momentum=momentum,
        )
        super().__init__((num_features,), eps, dtype, param_dtype, scale=affine, bias=bias)
        self.num_features = num_features
        self.momentum = momentum
        self.use_running_average = False
        shape = (num_features,)
        self.mean = nnx.data(nnx.BatchStat(jnp.zeros(shape, param_dtype)) if track else None)
        self.var = nnx.data(nnx.BatchStat(jnp.ones(shape, param_dtype)) if track else None)
        self.count = nnx.data(nnx.BatchStat(jnp.zeros((), jnp.int32)) if track else None)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode, for ``nnx.view``.

        Args:
          use_running_average: whether to normalise by the running statistics (evaluation).
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _running(self) -> RunningStats | None:
        if self.mean is None or self.var is None or self.count is None:
            return None
        return RunningStats(self.mean[...], self.var[...], self.count[...])

    def _remember(self, running: RunningStats | None) -> None:
        if self.mean is None or self.var is None or self.count is None or running is None:
            return
        self.mean[...], self.var[...], self.count[...] = running

    def _evaluate(self, x: Array, use_running_average: bool | None) -> Array | None:
        """Normalises by the running statistics if there are any and this call is to use them."""
        use = self.use_running_average if use_running_average is None else use_running_average
        running = self._running() if use else None
        if running is None:
            return None
        scale, bias = self._parameters()
        return functional.batch_norm_inference(
            x, running, scale, bias, eps=self.eps, dtype=self.dtype
        )
