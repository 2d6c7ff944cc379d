"""The affine step of all norms and its derivative, for which only the input is kept."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from flaxstab._checks import number
from flaxstab._dtypes import aligned, output_dtype, widest
from flaxstab._typing import Array, DTypeLike
from flaxstab.functional._moments import Moments, Sets, local_moments
from flaxstab.functional._recompute import recomputed

Known: TypeAlias = tuple[Array, Moments, Array | None]  # x, its moments, and where they are from
Arguments: TypeAlias = tuple[Array, Moments | None, Array | None, Array | None, Array | None]


def normalize(
    x: Array,
    statistics: Moments,
    scale: Array | None,
    bias: Array | None,
    *,
    eps: float,
    dtype: DTypeLike | None = None,
) -> Array:
    """Applies ``(x - mean) / sqrt(var + eps) * scale + bias``: the one affine step of all norms.

    Args:
      x: values, any shape.
      statistics: moments that broadcast to ``x``.
      scale: factor that broadcasts to ``x``, or ``None`` for 1.
      bias: summand that broadcasts to ``x``, or ``None`` for 0.
      eps: added to the variance.
      dtype: the result's dtype; ``None`` keeps that of ``x``.

    Returns:
      An array of the shape of ``x``.
    """
    wide = statistics.var.dtype
    factor = 1 / jnp.sqrt(statistics.var + eps)
    if scale is not None:
        factor = factor * aligned(scale, x, wide)
    y = statistics.center(x) * factor
    if bias is not None:
        y = y + aligned(bias, x, wide)
    return jnp.asarray(y, output_dtype(x, dtype))


def normalize_by(
    x: Array,
    statistics: Moments,
    scale: Array | None,
    bias: Array | None,
    *,
    eps: float,
    where: Array | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Applies :func:`normalize` by given moments, and keeps them and ``x`` for the backward pass.

    Args:
      x: values of any floating-point dtype.
      statistics: moments that broadcast to ``x``; gradients flow through them.
      scale: factor that broadcasts to ``x``, or ``None`` for 1.
      bias: summand that broadcasts to ``x``, or ``None`` for 0.
      eps: added to the variance, a number.
      where: booleans that broadcast to ``x``, as of :func:`standardized`.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      An array of the shape of ``x``.
    """
    result = output_dtype(x, dtype)
    return _given_region(x, statistics, where, scale, bias, eps=number(eps), dtype=result)


# Compiled, so that a call outside jit is not traced anew each time.
@partial(jax.jit, static_argnames=("eps", "dtype"), inline=True)
def _given_region(*arguments: Array | Moments | None, eps: float, dtype: DTypeLike) -> Array:
    return recomputed(partial(_apply_given, eps, dtype))(*arguments)


def _apply_given(
    eps: float,
    dtype: DTypeLike,
    x: Array,
    statistics: Moments,
    where: Array | None,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    def apply(x: Array) -> Array:
        return normalize(x, statistics, scale, bias, eps=eps, dtype=dtype)

    return _where(where, x, apply, apply)


def _where(
    where: Array | None,
    x: Array,
    inside: Callable[[Array], Array],
    outside: Callable[[Array], Array],
) -> Array:
    """Applies one function where a mask is true, another without gradient where it is not."""
    if where is None:
        return inside(x)
    y = inside(jnp.where(where, x, 0))  # what is left out may be NaN
    return jnp.where(where, y, jax.lax.stop_gradient(outside(x)))


def standardized(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    sets: Sets,
    *,
    found: Moments | None = None,
    eps: float,
    where: Array | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Normalises values by their own moments and keeps nothing but ``x`` for the backward pass.

    The derivative is exact although the moments count as constants: it knows that they are
    functions of ``x``. Forward mode and higher derivatives work.

    Args:
      x: values of any floating-point dtype.
      scale: factor that broadcasts to ``x``, or ``None`` for 1.
      bias: summand that broadcasts to ``x``, or ``None`` for 0.
      sets: which values are normalised together.
      found: their moments, which are kept as well. ``None`` computes them, once more in the
        backward pass.
      eps: added to the variance, a number.
      where: booleans that broadcast to ``x``, true at the values that ``found`` are those of,
        which must then be given. The others are normalised, too, and no gradient flows through
        them.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      An array of the shape of ``x``.
    """
    known = None if found is None else _traceable(found)
    result = output_dtype(x, dtype)
    return _region(x, known, where, scale, bias, sets=sets, eps=number(eps), dtype=result)


@partial(jax.jit, static_argnames=("sets", "eps", "dtype"), inline=True)
def _region(*arguments: Array | Moments | None, sets: Sets, eps: float, dtype: DTypeLike) -> Array:
    return recomputed(partial(_apply_own, sets, eps, dtype))(*arguments)


def _apply_own(
    sets: Sets,
    eps: float,
    dtype: DTypeLike,
    x: Array,
    found: Moments | None,
    where: Array | None,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    wide = jnp.asarray(x, widest(x.dtype))
    affine = tuple(None if v is None else aligned(v, x, wide.dtype) for v in (scale, bias))
    y = _where(
        where,
        wide,
        lambda x: _affine(sets, eps, x, found, where, *affine),
        lambda x: normalize(x, _known(sets, x, found), *affine, eps=eps),
    )
    return jnp.asarray(y, dtype)


def _traceable(found: Moments) -> Moments:
    """Returns the moments with a size that JAX can trace (2³¹ overflows) and that divides."""
    return found._replace(size=jnp.maximum(jnp.asarray(found.size, found.var.dtype), 1))


def _known(sets: Sets, x: Array, found: Moments | None) -> Moments:
    return _traceable(local_moments(x, sets)) if found is None else found


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _affine(
    sets: Sets,
    eps: float,
    x: Array,
    found: Moments | None,
    where: Array | None,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    del where  # what the derivative needs
    return normalize(x, _known(sets, x, found), scale, bias, eps=eps)


@_affine.defjvp
def _(sets: Sets, eps: float, primals: Arguments, tangents: Arguments) -> tuple[Array, Array]:
    y = _affine(sets, eps, *primals)
    tangent = _by_feature if sets.along_features(y.ndim) else _by_channel
    return y, tangent(sets, eps, primals, tangents)


def _by_channel(sets: Sets, eps: float, primals: Arguments, tangents: Arguments) -> Array:
    """Collects what is constant along the reduced axes: transposed, it takes but two reductions."""
    x, found, where, scale, _ = primals
    dx, _, _, dscale, dbias = tangents
    known = (x, _known(sets, x, found), where)
    centred, rate, size = _centred(sets, *known), _rate(sets, eps, *known), known[1].size
    factor = rate if scale is None else rate * scale
    mean, slope = sets.sums(dx, centred * dx, where=where)
    constant, slope = -factor * (mean / size), -factor * (jnp.square(rate) * slope / size)
    if dbias is not None:
        constant = constant + dbias
    if dscale is not None:
        slope = slope + rate * dscale
    return factor * dx + constant + centred * slope


def _by_feature(sets: Sets, eps: float, primals: Arguments, tangents: Arguments) -> Array:
    """Keeps the reductions over a sample's features apart from those over the samples."""
    x, found, where, scale, _ = primals
    dx, _, _, dscale, dbias = tangents
    known = (x, _known(sets, x, found), where)
    centred, rate, size = _centred(sets, *known), _rate(sets, eps, *known), known[1].size
    mean, slope = sets.sums(dx, centred * dx, where=where)
    dy = rate * dx - centred * (rate * (jnp.square(rate) * slope / size))
    if sets.centered:
        dy = dy - rate * (mean / size)
    if scale is not None and dscale is not None:
        # Computed afresh from x: as soon as two reductions along different axes share it, XLA
        # writes it out and much of what it is made of (CPU: 2 N of temporaries, 2.5x the time).
        again = jax.lax.optimization_barrier(x)
        known = (again, _known(sets, again, found), where)
        dy = dy * scale + _centred(sets, *known) * _rate(sets, eps, *known) * dscale
    return dy if dbias is None else dy + dbias


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _centred(sets: Sets, x: Array, found: Moments, where: Array | None) -> Array:
    """Returns ``x - mean``; its derivative takes ``found`` for a function of ``x``."""
    del sets, where
    return found.center(x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rate(sets: Sets, eps: float, x: Array, found: Moments, where: Array | None) -> Array:
    """Returns ``1 / sqrt(var + eps)``; its derivative takes ``found`` for a function of ``x``."""
    del sets, x, where
    return 1 / jnp.sqrt(found.var + eps)


@_centred.defjvp
def _(sets: Sets, primals: Known, tangents: Known) -> tuple[Array, Array]:
    (_, found, where), dx = primals, tangents[0]
    if sets.centered:
        dx = dx - sets.sums(dx, where=where)[0] / found.size
    return _centred(sets, *primals), dx


@_rate.defjvp
def _(sets: Sets, eps: float, primals: Known, tangents: Known) -> tuple[Array, Array]:
    _, found, where = primals
    rate = _rate(sets, eps, *primals)
    (slope,) = sets.sums(_centred(sets, *primals) * tangents[0], where=where)
    return rate, -rate * (jnp.square(rate) * slope / found.size)


def forget_compiled() -> None:
    """Makes the next call trace anew, for who replaces a function of this module."""
    for compiled in (_given_region, _region):
        compiled.clear_cache()  # type: ignore[attr-defined]  # documented, not annotated
