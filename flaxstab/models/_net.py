"""Document 1's ``Net``, initialised three ways."""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab import initializers, surgery
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.linear import Linear

_BIAS = 0.01


def _sigmoid(x: Array) -> Array:
    return jax.nn.sigmoid(x)


class _Net(nnx.Module):
    """What the three forms share: Linear(1, 2), sigmoid, Linear(2, 1)."""

    def __init__(
        self,
        kernel_init: Initializer | None,
        bias_init: Initializer | None,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(in_features: int, out_features: int) -> Linear:
            return Linear(
                in_features, out_features, kernel_init=kernel_init, bias_init=bias_init,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.layer = nnx.Sequential(linear(1, 2), _sigmoid)
        self.fc = linear(2, 1)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, 1)`` to ``(N, 1)``."""
        return self.fc(self.layer(x))


class NetInConstructor(_Net):
    """Document 1's ``Net``, first form: each layer gets its laws where it is built.

    Linear(1, 2), sigmoid, Linear(2, 1); Xavier's uniform weights, biases 0.01. The three forms
    have one law and one structure, that of ``torch_ref.models``.

    Args:
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys; the ``params`` stream is used.
    """

    def __init__(
        self,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        laws = (initializers.xavier_uniform(), initializers.constant(_BIAS))
        super().__init__(*laws, dtype, param_dtype, rngs)


def _xavier_and_small_bias(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
    if isinstance(module, Linear):
        surgery.redraw(module, "kernel", initializers.xavier_uniform(), rngs=rngs)
        surgery.redraw(module, "bias", initializers.constant(_BIAS), rngs=rngs)


class NetByApply(_Net):
    """Document 1's ``Net``, second form: PyTorch's ``apply``, here :func:`surgery.init_weights`.

    Laws, structure and arguments as in :class:`NetInConstructor`. The document says that ``apply``
    maps over the elements of a tensor; it visits every module, children first.
    """

    def __init__(
        self,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(None, None, dtype, param_dtype, rngs)
        surgery.init_weights(self, _xavier_and_small_bias, rngs=rngs)


class NetByModules(_Net):
    """Document 1's ``Net``, third form: a walk over the modules.

    Laws, structure and arguments as in :class:`NetInConstructor`. PyTorch's ``modules()`` comes
    parents first and in the order of definition, ``nnx.iter_modules`` children first and by name.
    """

    def __init__(
        self,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(None, None, dtype, param_dtype, rngs)
        for _, module in nnx.iter_modules(self):
            _xavier_and_small_bias(module, rngs=rngs)
