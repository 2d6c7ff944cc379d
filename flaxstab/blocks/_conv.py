"""A convolution with what follows it."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._checks import check, check_positive
from flaxstab._typing import Array, DTypeLike, Initializer, Sizes
from flaxstab.blocks._parts import Function, MakeNorm, chosen
from flaxstab.dropout import Dropout
from flaxstab.norms import BatchNorm, norm_act


class ConvNormAct(nnx.Module):
    """Convolution without bias, norm, activation, dropout: in the order of document 2, E-2 and J.

    Same result as ``torchvision.ops.Conv2dNormActivation`` and its 3-D sibling, and then dropout:
    the norm's bias serves as the convolution's, and the padding keeps the image's size at stride 1.
    The norm's statistics do not see the dropout. For the backward pass it keeps its input and the
    convolution's output.

    Args:
      in_ch: channels of the input.
      out_ch: channels of the output.
      kernel_size: the window, odd; an integer means two axes, a tuple has one entry per axis.
      stride: step of the window.
      drop: the probability of dropping an element behind the activation.
      norm: builds the norm; ``None`` = :class:`flaxstab.norms.BatchNorm`.
      act: the activation; ``None`` = ReLU.
      kernel_init: draws the kernel; ``None`` = He normal, fan in.
      dtype: dtype of computation and output; ``None`` = the input's.
      param_dtype: dtype of parameters and statistics.
      rngs: source of the keys, stream ``params``, and ``dropout`` if anything is dropped.

    Raises:
      ValueError: if a size is below 1, the window is even, ``drop`` is outside [0, 1], ``norm`` or
        ``act`` is no function, or ``rngs`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> ConvNormAct(3, 8, stride=2, rngs=nnx.Rngs(0))(jnp.ones((2, 7, 7, 3))).shape
      (2, 4, 4, 8)
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel_size: Sizes = 3,
        stride: int = 1,
        drop: float = 0.0,
        *,
        norm: MakeNorm | None = None,
        act: Function | None = None,
        kernel_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        check_positive(in_ch=in_ch, out_ch=out_ch, stride=stride)
        sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
        odd = all(isinstance(size, int | np.integer) and size % 2 == 1 for size in sizes)
        rule = "kernel_size must be an odd integer or a tuple of such"
        check(odd, rule, kernel_size=kernel_size)
        parts = chosen(BatchNorm, norm, act, kernel_init, None, dtype, param_dtype, rngs)
        self.conv = parts.conv(in_ch, out_ch, kernel_size, stride)
        self.norm = parts.norm(out_ch)
        self.act = parts.act
        self.drop = Dropout(drop, dtype=dtype, rngs=rngs if drop else None)

    def __call__(self, x: Array) -> Array:
        """Maps ``(N, *space, in_ch)`` to ``(N, *space / stride, out_ch)``, rounded up."""
        return self.drop(norm_act(self.norm, self.act, self.conv(x)))
