"""The linear layer."""

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check_last_axis, check_positive
from flaxstab._dtypes import floating, output_dtype
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.functional._recompute import with_parameters
from flaxstab.linear._base import drawn, drawn_bias


class Linear(nnx.Module):
    """Computes ``x @ kernel + bias``.

    Same result as ``torch.nn.Linear``: weight and bias start as U(±1 / sqrt(in_features)).

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      bias: whether to add a bias.
      kernel_init: draws the kernel, shape ``(in_features, out_features)``.
      bias_init: draws the bias, shape ``(out_features,)``; ``None`` = PyTorch's law.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys; the ``params`` stream is used.

    Raises:
      ValueError: if a size is below 1, ``rngs`` is missing, or the input does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Linear(3, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
      (2, 5)

    Differs from:
      ``torch.nn.Linear``, whose weight is the transposed kernel; ``flax.nnx.Linear``, whose
      kernel starts 1.73 times wider and whose bias starts at 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = None if dtype is None else floating("dtype", dtype)
        shape = (in_features, out_features)
        self.kernel = drawn(rngs, kernel_init or initializers.torch_weight(), shape, param_dtype)
        options = (rngs, bias_init, in_features, out_features, param_dtype)
        self.bias = nnx.data(drawn_bias(*options) if bias else None)

    def __call__(self, x: Array) -> Array:
        """Maps ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        check_last_axis("in_features", self.in_features, x.shape)
        dtype = output_dtype(x, self.dtype)
        bias = None if self.bias is None else self.bias[...]
        arrays = (jnp.asarray(x, dtype), self.kernel[...], bias)
        return with_parameters(functional.linear, *arrays, dtype=dtype)
