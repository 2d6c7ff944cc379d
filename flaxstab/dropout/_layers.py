"""Layers that drop elements, channels of a sample, or samples."""

from flaxstab import functional
from flaxstab._checks import check
from flaxstab._typing import Array, Shape
from flaxstab.dropout._base import Dropping, DroppingHalf, Source


class Dropout(DroppingHalf):
    """Zeroes elements at random in training and scales the others by ``1 / (1 - p)``.

    Same result as ``torch.nn.Dropout`` with the same mask: inverted dropout, the identity in
    evaluation. As in torch, NaN in a dropped place stays NaN. The mask is not kept for the backward
    pass but drawn again.

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
      ``flax.nnx.Dropout``, which accepts any rate, zeroes NaN in a dropped place, keeps its mask
      and hashes once per element instead of once per four.
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
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


class ChannelDropout(DroppingHalf):
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
        rngs: Source = None,
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


class AlphaDropout(DroppingHalf):
    """Drops elements to SELU's lower limit in training and keeps mean 0 and variance 1.

    Same result as ``torch.nn.AlphaDropout`` with the same mask; the formula is that of
    :func:`flaxstab.functional.alpha_dropout`. Arguments as in :class:`Dropout`. For
    ``torch.nn.FeatureAlphaDropout`` use :func:`flaxstab.functional.random_alpha_dropout`.

    Raises:
      ValueError: if ``p`` is outside [0, 1], or training needs a key and there is none.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> layer = AlphaDropout(0.5, rngs=nnx.Rngs(dropout=0))
      >>> y = layer(jax.random.normal(jax.random.key(0), (1000, 1000)))
      >>> round(abs(float(y.mean())), 2), round(float(y.std()), 2)
      (0.0, 1.0)

    Reference:
      G. Klambauer, T. Unterthiner, A. Mayr, S. Hochreiter, "Self-Normalizing Neural Networks",
      2017, arXiv:1706.02515.
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        mask: Array | None = None,
    ) -> Array:
        """Applies alpha dropout; the arguments are those of :class:`Dropout`'s call."""
        return self._drop(x, x.shape, deterministic, rngs, mask)

    def _masked(self, x: Array, mask: Array) -> Array:
        return functional.alpha_dropout(x, self.p, mask)

    def _random(self, x: Array, key: Array, drawn: Shape) -> Array:
        return functional.random_alpha_dropout(x, self.p, key, drawn)


class DropPath(Dropping):
    """Zeroes whole samples in training and scales the others by ``1 / (1 - p)``.

    Put at the end of a residual branch it skips the block for a sample: stochastic depth. Same
    result as ``torchvision.ops.StochasticDepth(p, "row")`` and timm's ``DropPath(p)`` with the same
    mask. Arguments as in :class:`Dropout`, here for samples, without a default for ``p``.

    Raises:
      ValueError: if ``p`` is outside [0, 1], training needs a key and there is none, or the
        input has no axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = DropPath(0.5, rngs=nnx.Rngs(dropout=0))
      >>> y = layer(jnp.ones((100, 4, 4, 8)))
      >>> bool((y == y[:, :1, :1, :1]).all()), sorted(set(y.ravel().tolist()))
      (True, [0.0, 2.0])

    Differs from:
      timm's with ``scale_by_keep=False``, which does not scale: the mean shrinks.

    Reference:
      G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
      2016, arXiv:1603.09382.
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        mask: Array | None = None,
    ) -> Array:
        """Applies dropout to the samples of ``(N, ...)``.

        Args:
          x: values, at least 1 axis.
          deterministic: overrides the layer's mode.
          rngs: overrides the layer's stream, as in :class:`Dropout`.
          mask: booleans that broadcast to ``x``, such as ``(N, 1, 1, 1)``, true where a sample is
            kept, instead of a draw.

        Returns:
          An array of the shape of ``x``.
        """
        check(x.ndim >= 1, "drop path needs (N, ...)", shape=x.shape)
        samples = (x.shape[0], *(1,) * (x.ndim - 1))
        return self._drop(x, samples, deterministic, rngs, mask)
