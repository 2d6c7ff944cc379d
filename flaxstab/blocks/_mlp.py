"""The feed-forward part of a Transformer."""

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional
from flaxstab._checks import check_positive
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.blocks._parts import Function, check_choices
from flaxstab.blocks._sublayers import fed_forward
from flaxstab.dropout import Dropout
from flaxstab.linear import Linear


class MLP(nnx.Module):
    """Linear, GELU, dropout, linear, dropout: document 2's feed-forward part (E-2), timm's ``Mlp``.

    The names are timm's: ``fc1``, ``fc2``. For the backward pass it keeps its input and the first
    layer's output, before the activation.

    Args:
      in_features: size of the input's last axis.
      hidden_features: width between both layers.
      out_features: size of the output's last axis; ``None`` = ``in_features``.
      drop: the probability of dropping an element behind the activation and behind the output.
      bias: whether both layers add a bias.
      act: the activation; ``None`` = exact GELU.
      kernel_init: draws both kernels; ``None`` = PyTorch's law for a linear layer.
      bias_init: draws both biases; ``None`` = PyTorch's law for a linear layer.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if a size is below 1, ``drop`` is outside [0, 1], ``act`` is no function, or
        ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> MLP(4, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
      (2, 3, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        drop: float = 0.0,
        bias: bool = True,
        *,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_features=in_features, hidden_features=hidden_features)
        check_choices(None, act, None)

        def linear(size: int, out: int) -> Linear:
            return Linear(
                size, out, bias, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.fc1 = linear(in_features, hidden_features)
        self.fc2 = linear(hidden_features, in_features if out_features is None else out_features)
        self.act = act or functional.gelu
        self.drop1 = Dropout(drop, dtype=dtype, rngs=rngs if drop else None)
        self.drop2 = Dropout(drop, dtype=dtype, rngs=rngs if drop else None)

    def __call__(self, x: Array) -> Array:
        """Maps ``(*batch, in_features)`` to ``(*batch, out_features)``."""
        return self.drop2(fed_forward(None, self.fc1, self.act, self.drop1, self.fc2, x))
