"""Normalisation and what follows it as one step that keeps only its inputs."""

from collections.abc import Callable
from typing import TypeVar, cast

from flaxstab._checks import check
from flaxstab._typing import Array
from flaxstab.functional._recompute import recomputed

Normalized = TypeVar("Normalized", bound=Array | tuple[Array, object])


def norm_act(
    norm: Callable[[Array], Normalized], act: Callable[[Array], Array], x: Array
) -> Normalized:
    """Computes ``act(norm(x))`` and keeps only ``x`` for the backward pass.

    Apart, an activation keeps its own input as well. Here the backward pass computes the
    normalised values again, but for batch normalisation's statistics, which stay.

    Args:
      norm: a normalisation of this package as a function of ``x`` alone, such as
        ``lambda x: layer_norm(x, (64,), scale, bias)``. What it closes over is kept. For a layer,
        which changes its statistics, use :func:`flaxstab.norms.norm_act`.
      act: the activation, elementwise.
      x: values, any shape that ``norm`` takes.

    Returns:
      An array of the shape of ``x``; where ``norm`` returns updated statistics too, as
      :func:`batch_norm` does, the pair of both.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flaxstab.functional import layer_norm
      >>> x = jnp.array([[1.0, 3.0]])
      >>> norm_act(lambda x: layer_norm(x, (2,)), jax.nn.relu, x).round().tolist()
      [[0.0, 1.0]]
    """
    return recomputed(lambda x: _on_values(act, norm(x)))(x)


def norm_add_act(
    norm: Callable[[Array], Normalized], act: Callable[[Array], Array], x: Array, residual: Array
) -> Normalized:
    """Computes ``act(norm(x) + residual)`` and keeps only its inputs for the backward pass.

    Args:
      norm: as of :func:`norm_act`.
      act: the activation, elementwise.
      x: values, any shape that ``norm`` takes.
      residual: added before the activation, shape of ``x``.

    Returns:
      As :func:`norm_act`.

    Raises:
      ValueError: if ``residual`` has another shape than ``x``.
    """
    check_residual(residual, x)
    add_act = recomputed(lambda x, r: _on_values(lambda y: act(y + r), norm(x)))
    return add_act(x, residual)


def check_residual(residual: Array, x: Array) -> None:
    """Raises a ``ValueError`` unless what is added has the shape of the input."""
    rule = "residual must have the shape of x"
    check(residual.shape == x.shape, rule, residual=residual.shape, x=x.shape)


def _on_values(function: Callable[[Array], Array], found: Normalized) -> Normalized:
    """Applies a function to normalised values, beside which statistics may stand."""
    if isinstance(found, tuple):
        return cast("Normalized", (function(found[0]), *found[1:]))
    return cast("Normalized", function(found))
