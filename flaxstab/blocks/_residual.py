"""The residual wiring of every block, in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from flaxstab import dropout
from flaxstab._checks import check, check_probability
from flaxstab._dtypes import aligned, floating
from flaxstab._typing import Array, DTypeLike


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How a block adds its branch: ``x + drop_path(scale * gamma * branch)``.

    Args:
      scale: constant factor of the branch, not 0; document 2 (B-6, G) names 0.1.
      layer_scale: initial value of a learned factor per channel (LayerScale); ``None`` = none.
      drop_path: the probability of dropping a sample's whole branch in training, in [0, 1].
      zero_init: whether the branch starts at zero: the last convolution or linear layer of a
        pre-norm block, the last norm of a post-activation one. What
        :func:`flaxstab.surgery.zero_last_gamma` does to a built model.

    Raises:
      ValueError: if a number is not finite, ``scale`` is 0 or ``layer_scale`` is under
        ``zero_init`` (the branch would never train), or
        ``drop_path`` lies outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import blocks
      >>> wiring = Residual(scale=0.1, drop_path=0.2)
      >>> block = blocks.BasicBlock(4, 4, residual=wiring, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 3, 3, 4))).shape
      (2, 3, 3, 4)

    Reference:
      H. Touvron et al., "Going Deeper with Image Transformers", 2021, arXiv:2103.17239
      (LayerScale, equation 3); G. Huang et al., "Deep Networks with Stochastic Depth", 2016,
      arXiv:1603.09382; C. Szegedy et al., "Inception-v4", 2016, arXiv:1602.07261 (section 3.3,
      scaling of residuals by 0.1 to 0.3).
    """

    scale: float = 1.0
    layer_scale: float | None = None
    drop_path: float = 0.0
    zero_init: bool = False

    def __post_init__(self) -> None:
        check(
            math.isfinite(self.scale) and self.scale != 0,
            "scale must be a finite number other than 0",
            fix="For a branch that starts at 0 and trains, pass zero_init=True.",
            scale=self.scale,
        )
        check(
            self.layer_scale is None or math.isfinite(self.layer_scale),
            "layer_scale must be a finite number or None",
            layer_scale=self.layer_scale,
        )
        check(
            not (self.zero_init and self.layer_scale == 0),
            "layer_scale and zero_init must not both be 0: the branch would never train",
            fix="Leave out one of them.",
            layer_scale=self.layer_scale,
        )
        check_probability(drop_path=self.drop_path)


class Add(nnx.Module):
    """Adds a branch to its input by a :class:`Residual`.

    Args:
      residual: how.
      features: size of the last axis.
      param_dtype: dtype of ``gamma``.
      rngs: source of the keys, stream ``dropout``, if paths are dropped.
    """

    def __init__(
        self,
        residual: Residual,
        features: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.scale = residual.scale
        self.gamma = nnx.data(_gamma(residual.layer_scale, features, param_dtype))
        drops = residual.drop_path > 0
        self.drop_path = nnx.data(
            dropout.DropPath(residual.drop_path, rngs=rngs) if drops else None
        )

    def __call__(self, x: Array, branch: Array) -> Array:
        """Returns the sum, in the shape and dtype of ``branch``."""
        if self.gamma is not None:
            branch = branch * aligned(self.gamma[...], branch, branch.dtype)
        if self.scale != 1:
            branch = branch * jnp.asarray(self.scale, branch.dtype)
        if self.drop_path is not None:
            branch = self.drop_path(branch)
        return jnp.asarray(x, branch.dtype) + branch


def _gamma(initial: float | None, features: int, param_dtype: DTypeLike) -> nnx.Param[Array] | None:
    if initial is None:
        return None
    dtype = floating("param_dtype", param_dtype)
    return nnx.Param(jnp.full(features, initial, dtype), role="layer_scale")


def wired(
    branch: Callable[[nnx.Module | None, Array], Array],
    norm: nnx.Module,
    add: Add,
    x: Array,
    *,
    norm_first: bool,
) -> Array:
    """Joins a sublayer to its input: ``x + branch(norm(x))``, or ``norm(x + branch(x))``.

    Args:
      branch: from a norm, or ``None`` for none, and the input to what is added. It applies the
        norm itself, as one step with what follows.
      norm: the sublayer's norm.
      add: adds the branch.
      x: the input.
      norm_first: whether the branch sees its input through the norm.
    """
    return add(x, branch(norm, x)) if norm_first else norm(add(x, branch(None, x)))


def start_at_zero(norm: nnx.Module) -> None:
    """Sets scale and bias of a block's last norm to 0, in place.

    Raises:
      ValueError: if it has no scale that trains.
    """
    scale, bias = (vars(norm).get(name) for name in ("scale", "bias"))
    if not isinstance(scale, nnx.Param):
        raise ValueError(
            "zero_init needs a last norm whose scale trains, "
            f"got {type(norm).__name__} without one. Give the norm affine parameters."
        )
    for parameter in (scale, bias):
        if isinstance(parameter, nnx.Param):
            parameter[...] = jnp.zeros_like(parameter[...])
