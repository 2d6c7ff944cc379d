"""What every dropout layer holds and does: probability, mode, keys, and one way to apply them."""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional
from flaxstab._checks import check_probability
from flaxstab._dtypes import floating, output_dtype
from flaxstab._typing import Array, DTypeLike, Shape

Source: TypeAlias = nnx.Rngs | nnx.RngStream | Array | None
"""Where keys come from at a call; ``None`` = the layer's own stream."""


def _stream(rngs: nnx.Rngs) -> nnx.RngStream:
    is_rngs = isinstance(rngs, nnx.Rngs)
    if is_rngs and ("dropout" in rngs or "default" in rngs):
        return rngs["dropout"]
    raise ValueError(
        "dropout needs nnx.Rngs with a 'dropout' stream or a default one, got "
        f"{sorted(rngs) if is_rngs else type(rngs).__name__}. "
        "Pass nnx.Rngs(seed), or nnx.Rngs(params=…, dropout=…)."
    )


class Dropping(nnx.Module):
    """Holds what every dropout layer holds: its probability, its mode and its stream of keys."""

    def __init__(
        self,
        p: float,
        *,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del param_dtype
        check_probability(p=p)
        self.p = p
        self.deterministic = deterministic
        self.dtype = None if dtype is None else floating("dtype", dtype)
        self.rngs = nnx.data(None if rngs is None else _stream(rngs).fork())

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode, for ``nnx.view``.

        Args:
          deterministic: whether to pass the input through.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def next_key(self, *, deterministic: bool | None = None, rngs: Source = None) -> Array | None:
        """Returns the key that the next call would draw with, and advances its stream.

        A key can enter what a stream cannot, such as ``jax.checkpoint`` or the step of a ``scan``:
        ``layer(x, rngs=key)`` there touches no stream and drops the same each time.

        Args:
          deterministic: overrides the layer's mode.
          rngs: overrides the layer's stream: ``Rngs`` with a ``dropout`` stream, a stream, or a
            key, which is returned as it is.

        Returns:
          A key, or ``None`` where nothing would be dropped: in evaluation and for ``p`` 0.

        Raises:
          ValueError: if a key is needed and there is none.
        """
        if not self._drops(deterministic):
            return None
        source = self.rngs if rngs is None else rngs
        if source is None:
            raise ValueError(
                "dropout in training needs a key, got rngs=None. "
                "Build the layer with rngs=nnx.Rngs(dropout=seed), or pass rngs= at the call."
            )
        if isinstance(source, Array | np.ndarray):
            return jnp.asarray(source)
        return source() if isinstance(source, nnx.RngStream) else _stream(source)()

    def _drops(self, deterministic: bool | None = None) -> bool:
        return self.p > 0 and not self._passes(deterministic)

    def _passes(self, deterministic: bool | None) -> bool:
        return self.deterministic if deterministic is None else deterministic

    def _drop(
        self,
        x: Array,
        drawn: Shape,
        deterministic: bool | None,
        rngs: Source,
        mask: Array | None,
    ) -> Array:
        """Applies dropout by the given mask, or by one that is drawn in the shape ``drawn``."""
        x = jnp.asarray(x, output_dtype(x, self.dtype))
        if self._passes(deterministic):
            return x
        if mask is not None:
            return self._masked(x, mask)
        key = self.next_key(deterministic=deterministic, rngs=rngs)
        return x if key is None else self._random(x, key, drawn)

    def _masked(self, x: Array, mask: Array) -> Array:
        return functional.dropout(x, self.p, mask)

    def _random(self, x: Array, key: Array, drawn: Shape) -> Array:
        return functional.random_dropout(x, self.p, key, drawn)


class DroppingHalf(Dropping):
    """The same, dropping with probability 0.5 by default, as torch's layers do."""

    def __init__(
        self,
        p: float = 0.5,
        *,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(
            p, deterministic=deterministic, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
