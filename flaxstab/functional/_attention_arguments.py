"""What attention is given beside query, key and value, and how all of it must fit together."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from flaxstab._checks import check, check_probability
from flaxstab._typing import Array, Shape

Arrays = Array | Sequence[Array] | None


class How(NamedTuple):
    """The settings of :func:`flaxstab.functional.attention`."""

    is_causal: bool
    p: float
    scale: float | None
    open_keys: int


class Given(NamedTuple):
    """The arrays that it takes beside query, key and value.

    Attributes:
      masks: true where a key is ignored.
      biases: added to the logits.
      key: for dropout.
      kept: true where dropout keeps a probability.
    """

    masks: tuple[Array, ...]
    biases: tuple[Array, ...]
    key: Array | None
    kept: Array | None

    @classmethod
    def of(cls, mask: Arrays, bias: Arrays, key: Array | None, kept: Array | None) -> "Given":
        """Returns the arrays as the caller gave them."""
        return cls(_several(mask), _several(bias), key, kept)


def _several(arrays: Arrays) -> tuple[Array, ...]:
    if arrays is None:
        return ()
    return (*arrays,) if isinstance(arrays, tuple | list) else (jnp.asarray(arrays),)


def check_shapes(query: Array, key: Array, value: Array, how: How) -> None:
    """Raises a ``ValueError`` unless query, key and value fit together, and the settings to them.

    Args:
      query: shape ``(N, L, H, E)``.
      key: shape ``(N, S, H, E)``.
      value: shape ``(N, S, H, Ev)``.
      how: the settings.
    """
    q, k, v = query.shape, key.shape, value.shape
    check(
        len(q) == len(k) == len(v) == 4,
        "query, key and value must have 4 axes, (N, positions, heads, features)",
        fix="Give a single sample a batch axis: x[None].",
        query=q,
        key=k,
        value=v,
    )
    rule = "key must have the batch, heads and features of query"
    check((q[0], *q[2:]) == (k[0], *k[2:]), rule, query=q, key=k)
    check(k[:3] == v[:3], "value must have the batch, positions and heads of key", key=k, value=v)
    check_probability(p=how.p)
    rule = "open_keys must be a number of keys"
    check(0 <= how.open_keys <= k[1], rule, open_keys=how.open_keys, key=k)


def fitted(given: Given, how: How, shape: Shape) -> Given:
    """Returns what is given with four axes each.

    Args:
      given: as the caller gave it.
      how: the settings.
      shape: ``(N, H, L, S)``.

    Raises:
      ValueError: if something has another dtype or does not broadcast to the shape, or dropout has
        no key.
    """
    check(
        how.p == 0 or given.key is not None or given.kept is not None,
        "dropout in attention needs a key",
        fix="Pass dropout_key=jax.random.key(seed), or p=0.",
        p=how.p,
        dropout_key=None,
    )
    closed = (*shape[:3], shape[3] - how.open_keys)
    fixes = (
        "Pass mask.astype(bool), true where a key is ignored; give floats as a bias.",
        "Give booleans as a mask.",
        "Pass dropout_mask.astype(bool), true where a probability is kept.",
    )
    masks = tuple(_fit("mask", a, closed, jnp.bool_, fixes[0]) for a in given.masks)
    biases = tuple(_fit("bias", a, closed, jnp.floating, fixes[1]) for a in given.biases)
    kept = given.kept
    if kept is not None:
        kept = _fit("dropout_mask", kept, shape, jnp.bool_, fixes[2])
    return Given(masks, biases, given.key, kept)


def _fit(name: str, array: Array, shape: Shape, kind: type[object], fix: str) -> Array:
    array = jnp.asarray(array)
    rule = f"{name} must be {'boolean' if kind is jnp.bool_ else 'floating-point'}"
    check(jnp.issubdtype(array.dtype, kind), rule, fix=fix, dtype=str(array.dtype))
    full = (1,) * (4 - array.ndim) + array.shape
    fits = len(full) == 4 and all(a in (1, n) for a, n in zip(full, shape, strict=True))
    given: dict[str, object] = {name: array.shape, "(N, H, L, S)": shape}
    check(fits, f"{name} must broadcast to (N, H, L, S)", fix="", **given)
    return array.reshape(full)
