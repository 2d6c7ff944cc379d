"""What blocks of convolutions share: how they make their layers."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from flax import nnx

from flaxstab import functional, initializers
from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, Initializer, Sizes
from flaxstab.blocks._residual import Add, Residual, start_at_zero
from flaxstab.linear import Conv
from flaxstab.linear._base import check_rngs

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


class Parts(NamedTuple):
    """Makes the layers of one block, all with the same settings; :func:`chosen` checks them."""

    make_norm: MakeNorm
    act: Function
    kernel_init: Initializer | None
    residual: Residual
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def conv(
        self, in_ch: int, out_ch: int, window: Sizes, stride: int = 1, *, last: bool = False
    ) -> Conv:
        """Returns a convolution without bias that keeps the image's size at stride 1.

        Args:
          in_ch: channels of the input.
          out_ch: channels of the output.
          window: its odd size.
          stride: its step.
          last: whether it ends a branch, which may have to start at zero.
        """
        init = self.kernel_init or initializers.kaiming_normal(nonlinearity="relu")
        init = initializers.zeros if last and self.residual.zero_init else init
        sizes = window if isinstance(window, tuple) else (window, window)
        return Conv(
            in_ch, out_ch, sizes, stride, padding=tuple(size // 2 for size in sizes), bias=False,
            kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs,
        )  # fmt: skip

    def norm(self, channels: int, *, last: bool = False) -> nnx.Module:
        """Returns a norm for the given number of channels; ``last`` as in :meth:`conv`."""
        made = self.make_norm(
            channels, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs
        )
        if last and self.residual.zero_init:
            start_at_zero(made)
        return made

    def add(self, channels: int) -> Add:
        """Returns what adds the branch to the skip."""
        return Add(self.residual, channels, param_dtype=self.param_dtype, rngs=self.rngs)

    def projection(self, in_ch: int, out_ch: int, stride: int) -> Conv | None:
        """Returns the skip's 1x1 convolution where the shape changes."""
        changes = stride != 1 or in_ch != out_ch
        return self.conv(in_ch, out_ch, 1, stride) if changes else None

    def downsample(self, in_ch: int, out_ch: int, stride: int) -> nnx.Sequential | None:
        """Returns the skip's 1x1 convolution with a norm where the shape changes."""
        convolution = self.projection(in_ch, out_ch, stride)
        return None if convolution is None else nnx.Sequential(convolution, self.norm(out_ch))


def check_choices(norm: MakeNorm | None, act: Function | None, residual: Residual | None) -> None:
    """Raises a ``ValueError`` unless each is ``None`` or what its name says."""
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
    check(
        residual is None or isinstance(residual, Residual),
        "residual must be a blocks.Residual",
        fix="Pass e.g. blocks.Residual(scale=0.1).",
        residual=residual,
    )


def chosen(
    default_norm: MakeNorm,
    norm: MakeNorm | None,
    act: Function | None,
    kernel_init: Initializer | None,
    residual: Residual | None,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs | None,
) -> Parts:
    """Returns what makes a block's layers, from the block's own arguments.

    Raises:
      ValueError: if ``norm`` or ``act`` is no function, ``residual`` is something else than its
        name says, or ``rngs`` is missing.
    """
    check_choices(norm, act, residual)
    return Parts(
        norm or default_norm,
        act or functional.relu,
        kernel_init,
        residual or Residual(),
        dtype,
        param_dtype,
        check_rngs(rngs),
    )
