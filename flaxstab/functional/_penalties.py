"""Penalties on the size of parameters, all of them or those that a mask names."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array, Float, PyTree
from flaxstab.functional._paths import by_path, is_flag

Mask: TypeAlias = Callable[[PyTree], PyTree] | PyTree  # booleans, or what makes them of parameters


def l1_penalty(*params: PyTree, mask: Mask | None = None) -> Float[Array, ""]:
    """Returns the sum of absolute values of all elements, in float32 or wider.

    Args:
      *params: arrays, or trees of them such as ``nnx.state(model, nnx.Param)``.
      mask: which of them count: a tree with a known boolean at each parameter's place, or a
        function from parameters to one, such as ``optim.decay_mask(model)``; ``None`` = all.
        Places are compared by path, as in :mod:`flaxstab.optim`: the mask of a pure dict serves
        the ``nnx.State``, too.

    Raises:
      ValueError: if the mask does not hold one boolean per parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([5.0])}
      >>> print(l1_penalty(params), l1_penalty(params, mask={"kernel": True, "bias": False}))
      8.0 3.0

    Differs from:
      ``jnp.sum(jnp.abs(x))``, whose gradient at 0 is 1; here and in torch it is 0.
    """
    return _sum(lambda a: a * jnp.sign(a), params, mask)  # jnp.abs has slope 1 at 0


def l2_penalty(*params: PyTree, mask: Mask | None = None) -> Float[Array, ""]:
    """Returns half the sum of squares of all elements, in float32 or wider.

    The half makes the gradient the parameter itself, so that ``decay * l2_penalty(params)`` equals
    PyTorch's ``weight_decay=decay`` of ``SGD`` and ``Adam``.

    Args:
      *params: arrays, or trees of them.
      mask: which of them count, as of :func:`l1_penalty`.

    Raises:
      ValueError: if the mask does not hold one boolean per parameter.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> print(jax.grad(l2_penalty)(jnp.array([1.0, -2.0])))
      [ 1. -2.]
    """
    return _sum(jnp.square, params, mask) / 2


def _sum(
    term: Callable[[Array], Array], params: tuple[PyTree, ...], mask: Mask | None
) -> Float[Array, ""]:
    arrays = _chosen(params[0] if len(params) == 1 else params, mask)
    wide = widest(*(a.dtype for a in arrays))
    terms = (jnp.sum(term(jnp.asarray(a, wide))) for a in arrays)
    return sum(terms, jnp.zeros((), wide))


def _chosen(params: PyTree, mask: Mask | None) -> list[Array]:
    """Returns the leaves where the mask is true."""
    if mask is None:
        return jax.tree.leaves(params)
    made = by_path(mask(params) if callable(mask) else mask)
    flags = {path: flag for path, flag in made.items() if flag is not None}
    places = by_path(params)
    leaves = {path: leaf for path, leaf in places.items() if leaf is not None}
    odd = {path for path, flag in flags.items() if path not in places or not is_flag(flag)}
    apart = sorted(".".join(path) for path in odd | (leaves.keys() - flags.keys()))
    check(
        not apart,
        "mask must be a tree like the parameters, with one known boolean for each",
        fix="",
        leaf=", ".join(apart) or "the whole",
    )
    return [leaf for path, leaf in leaves.items() if flags[path]]
