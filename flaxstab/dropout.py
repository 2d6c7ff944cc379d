"""Dropout layers."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional
from flaxstab._checks import check, check_probability
from flaxstab._dtypes import floating, output_dtype
from flaxstab._typing import Array, DTypeLike, Shape


def _stream(rngs: nnx.Rngs) -> nnx.RngStream:
    is_rngs = isinstance(rngs, nnx.Rngs)
    if is_rngs and ("dropout" in rngs or "default" in rngs):
        return rngs["dropout"]
    raise ValueError(
        "dropout needs nnx.Rngs with a 'dropout' stream or a default one, got "
        f"{sorted(rngs) if is_rngs else type(rngs).__name__}. "
        "Pass nnx.Rngs(seed), or nnx.Rngs(params=…, dropout=…)."
    )


class _Dropping(nnx.Module):
    """Holds what every dropout layer holds: its probability, its mode and its stream of keys."""

    def __init__(
        self,
        p: float = 0.5,
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

    def _drop(
        self,
        x: Array,
        drawn: Shape,
        deterministic: bool | None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None,
        mask: Array | None,
    ) -> Array:
        """Applies dropout by the given mask, or by one that is drawn in the shape ``drawn``."""
        x = jnp.asarray(x, output_dtype(x, self.dtype))
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or (self.p == 0 and mask is None):
            return x
        if mask is None:
            mask = functional.dropout_mask(self._key(rngs), self.p, drawn)
        return functional.dropout(x, self.p, mask)

    def _key(self, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array:
        source = self.rngs if rngs is None else rngs
        if source is None:
            raise ValueError(
                "dropout in training needs a key, got rngs=None. "
                "Build the layer with rngs=nnx.Rngs(dropout=seed), or pass rngs= at the call."
            )
        if isinstance(source, Array | np.ndarray):
            return jnp.asarray(source)
        return source() if isinstance(source, nnx.RngStream) else _stream(source)()


class Dropout(_Dropping):
    """Zeroes elements at random in training and scales the others by ``1 / (1 - p)``.

    Same result as ``torch.nn.Dropout`` with the same mask: inverted dropout, the identity in
    evaluation. As in torch, NaN in a dropped place stays NaN.

    Args:
      p: the probability of dropping an element, in [0, 1].
      deterministic: whether to start in evaluation mode.
      dtype: dtype of the output; ``None`` = the input's.
      param_dtype: accepted like every layer's; there are no parameters.
      rngs: source of the keys; a stream of its own is forked from ``dropout``.

    Raises:
      ValueError: if ``p`` is outside [0, 1], ``rngs`` has no such stream, or training needs a key
        and there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = Dropout(0.5, rngs=nnx.Rngs(dropout=0))
      >>> sorted(set(layer(jnp.ones(100)).tolist()))
      [0.0, 2.0]

    Differs from:
      ``flax.nnx.Dropout``, which accepts any rate and zeroes NaN in a dropped place.
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Applies dropout.

        Args:
          x: values, any shape.
          deterministic: overrides the layer's mode.
          rngs: overrides the layer's stream: ``Rngs`` with a ``dropout`` stream, a stream, or a
            key.
          mask: booleans that broadcast to ``x``, true where an element is kept, instead of a
            draw.

        Returns:
          An array of the shape of ``x``.
        """
        return self._drop(x, x.shape, deterministic, rngs, mask)


class ChannelDropout(_Dropping):
    """Zeroes whole channels of a sample in training and scales the others by ``1 / (1 - p)``.

    Same result as ``torch.nn.Dropout1d``, ``Dropout2d``, ``Dropout3d`` with the same mask, on
    arrays with features last. Arguments as in :class:`Dropout`, here for channels.

    Raises:
      ValueError: if ``p`` is outside [0, 1], training needs a key and there is none, or the
        input has no batch or no spatial axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = ChannelDropout(0.5, rngs=nnx.Rngs(dropout=0))
      >>> y = layer(jnp.ones((8, 4, 4, 100)))
      >>> bool((y == y[:, :1, :1]).all()), sorted(set(y.ravel().tolist()))
      (True, [0.0, 2.0])

    Differs from:
      torch's, which take an array of one axis less for a single sample.

    Reference:
      J. Tompson, R. Goroshin, A. Jain, Y. LeCun, C. Bregler, "Efficient Object Localization Using
      Convolutional Networks", 2014, arXiv:1411.4280 (section 3.2, SpatialDropout).
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Applies dropout to ``(N, *space, C)``.

        Args:
          x: values, at least 3 axes.
          deterministic: overrides the layer's mode.
          rngs: overrides the layer's stream, as in :class:`Dropout`.
          mask: booleans that broadcast to ``x``, such as ``(N, 1, 1, C)``, true where a channel
            is kept, instead of a draw.

        Returns:
          An array of the shape of ``x``.
        """
        check(
            x.ndim >= 3,
            "channel dropout needs (N, *space, C)",
            fix="Use Dropout for (N, C); give a single sample a batch axis.",
            shape=x.shape,
        )
        channels = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        return self._drop(x, channels, deterministic, rngs, mask)
