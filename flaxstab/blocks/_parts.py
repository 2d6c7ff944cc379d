"""What residual blocks share: the wiring, and how a block makes its layers."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from flax import nnx

from flaxstab import initializers
from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, Initializer
from flaxstab.linear import Conv

Function = Callable[[Array], Array]


class MakeNorm(Protocol):
    """Builds a normalisation layer: ``norms.BatchNorm`` is one such, ``partial(GroupNorm, 8)`` too.

    The result is called with an array and returns one of its shape.
    """

    def __call__(
        self,
        channels: int,
        /,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """Returns a layer for the given number of channels."""


def check_choices(norm: MakeNorm | None, act: Function | None) -> None:
    """Raises a ``ValueError`` unless both are ``None`` or functions."""
    check(
        norm is None or (callable(norm) and not isinstance(norm, nnx.Module)),
        "norm must be a function that builds a norm",
        fix="Pass e.g. functools.partial(norms.GroupNorm, 8): each norm is built anew.",
        norm=norm if isinstance(norm, str) else type(norm).__name__,
    )
    check(
        act is None or (callable(act) and not isinstance(act, type)),
        "act must be a function of an array",
        fix="Pass e.g. flaxstab.functional.relu.",
        act=act,
    )


def residual(x: Array, branch: Function, skip: Function | None) -> Array:
    """Returns ``branch(x) + skip(x)``; without a skip the input itself is added.

    Args:
      x: the block's input.
      branch: what is learned.
      skip: brings the input to the shape of the branch's output, where it differs.

    Returns:
      An array of the shape and dtype of the branch's output.
    """
    y = branch(x)
    return y + jnp.asarray(x if skip is None else skip(x), y.dtype)


class Parts(NamedTuple):
    """Makes the layers of one block, all with the same settings."""

    make_norm: MakeNorm
    kernel_init: Initializer | None
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def conv(self, in_ch: int, out_ch: int, window: int, stride: int = 1) -> Conv:
        """Returns a convolution without bias that keeps the image's size at stride 1."""
        init = self.kernel_init or initializers.kaiming_normal(nonlinearity="relu")
        return Conv(
            in_ch, out_ch, window, stride, padding=window // 2, bias=False, kernel_init=init,
            dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs,
        )  # fmt: skip

    def norm(self, channels: int) -> nnx.Module:
        """Returns a norm for the given number of channels."""
        return self.make_norm(
            channels, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs
        )
