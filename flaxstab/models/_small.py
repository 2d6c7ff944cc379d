"""The documents' small models."""

import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike
from flaxstab.linear import Conv, Linear
from flaxstab.models._activations import Act, activation
from flaxstab.norms import BatchNorm, GroupNorm


class SmallCNN(nnx.Module):
    """Two convolutions, global average pooling, a linear head (document 2, B-5).

    He initialisation, biases 0. Same structure as ``torch_ref.models.SmallCNN``, so that weights
    map one to one: ``net.0``, ``net.2``, ``net.6``.

    Args:
      act: ``'relu'``, ``'gelu'`` (exact) or ``'elu'``.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of the parameters.
      rngs: source of the keys; the ``params`` stream is used.

    Raises:
      ValueError: if ``act`` is unknown.
    """

    def __init__(
        self,
        act: Act = "relu",
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        he = initializers.kaiming_normal(nonlinearity="relu")

        def conv(channels: int) -> Conv:
            return Conv(
                channels, 64, 3, padding=1, kernel_init=he, bias_init=initializers.zeros,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        nonlinearity = activation(act)
        self.net = nnx.Sequential(
            conv(3), nonlinearity, conv(64), nonlinearity, _global_average, _flatten,
            Linear(
                64, 10, kernel_init=he, bias_init=initializers.zeros, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            ),
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """Maps images ``(N, H, W, 3)`` to logits ``(N, 10)``."""
        return self.net(x)


def _global_average(x: Array) -> Array:
    return functional.adaptive_avg_pool(x, 1)


def _flatten(x: Array) -> Array:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


class ToyDeep(nnx.Module):
    """Ten linear layers of width 512, each with a ReLU (document 2, H-1).

    Shows which initialisation keeps the spread of activations: Kaiming does, Xavier halves the
    variance at every layer.

    Args:
      init_name: ``'xavier'`` or ``'kaiming'`` (both normal); biases 0.
      param_dtype: dtype of the parameters.
      rngs: source of the keys; the ``params`` stream is used.

    Raises:
      ValueError: if ``init_name`` is unknown.
    """

    def __init__(
        self,
        init_name: Literal["xavier", "kaiming"] = "xavier",
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        laws = {
            "xavier": initializers.xavier_normal(),
            "kaiming": initializers.kaiming_normal(nonlinearity="relu"),
        }
        check(init_name in laws, "init_name must be 'xavier' or 'kaiming'", init_name=init_name)

        def layer() -> Linear:
            return Linear(
                512, 512, kernel_init=laws[init_name], bias_init=initializers.zeros,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.net = nnx.Sequential(*(part for _ in range(10) for part in (layer(), functional.relu)))

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, 512)`` to ``(N, 512)``."""
        return self.net(x)

    def activations(self, x: Array) -> list[Array]:
        """Returns the ten activations behind the ReLUs, each ``(N, 512)``."""
        found = []
        for linear, act in zip(self.net.layers[::2], self.net.layers[1::2], strict=True):
            x = act(linear(x))
            found.append(x)
        return found


class CNN_BN(nnx.Module):  # noqa: N801  # the document's name
    """Two convolutions without bias, each with batch normalisation and ReLU (document 2, H-2).

    Args:
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys; the ``params`` stream is used.
    """

    def __init__(
        self,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        def conv(channels: int) -> Conv:
            return Conv(
                channels, 64, 3, padding=1, bias=False, dtype=dtype, param_dtype=param_dtype,
                rngs=rngs,
            )  # fmt: skip

        def norm() -> BatchNorm:
            return BatchNorm(64, dtype=dtype, param_dtype=param_dtype)

        self.net = nnx.Sequential(
            conv(3), norm(), functional.relu, conv(64), norm(), functional.relu
        )

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, 3)`` to ``(N, H, W, 64)``."""
        return self.net(x)


class CNN_LN(nnx.Module):  # noqa: N801  # the document's name
    """The like of :class:`CNN_BN` with one-group normalisation and biases (document 2, H-2).

    ``GroupNorm(1, 64)`` normalises each sample over ``(H, W, C)``; the document calls it
    layer normalisation over channels only.

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
        self.conv1 = Conv(3, 64, 3, padding=1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv2 = Conv(64, 64, 3, padding=1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.ln1 = GroupNorm(1, 64, dtype=dtype, param_dtype=param_dtype)
        self.ln2 = GroupNorm(1, 64, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, H, W, 3)`` to ``(N, H, W, 64)``."""
        x = functional.relu(self.ln1(self.conv1(x)))
        return functional.relu(self.ln2(self.conv2(x)))
