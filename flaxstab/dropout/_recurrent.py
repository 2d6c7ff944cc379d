"""Dropout that stays the same for a whole sequence: of its inputs and of a cell's state."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, Initializer, PyTree, Shape
from flaxstab.dropout._base import Dropping, Source

Carry: TypeAlias = tuple[PyTree[Array], Array | None]


class RecurrentDropout(Dropping):
    """Zeroes features of a sequence in training, the same ones at every step.

    The others are scaled by ``1 / (1 - p)``. Same result as ``torch_ref.dropout.RecurrentDropout``
    with the same mask. Arguments as in :class:`flaxstab.dropout.Dropout`, without a default for
    ``p``.

    A sequence can be taken step by step, in ``jax.lax.scan`` for example: one key for all steps,
    ``key = layer.next_key()``, and at each of them ``layer(x, rngs=key)`` on ``(N, C)`` drop what
    the call on the whole sequence drops with that key. For cells in ``nnx.RNN`` see
    :class:`RecurrentDropoutCell`.

    Raises:
      ValueError: if ``p`` is outside [0, 1], training needs a key and there is none, or the
        input has not 2 or 3 axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = RecurrentDropout(0.5, rngs=nnx.Rngs(dropout=0))
      >>> y = layer(jnp.ones((8, 20, 64)))
      >>> bool((y == y[:, :1]).all()), sorted(set(y.ravel().tolist()))
      (True, [0.0, 2.0])

    Differs from:
      ``torch.nn.LSTM(dropout=p)``, which draws anew at every step, between layers only.

    Reference:
      Y. Gal, Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
      Networks", 2016, arXiv:1512.05287.
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: Source = None,
        mask: Array | None = None,
    ) -> Array:
        """Applies dropout to the features of ``(N, T, C)``, or of one step ``(N, C)``.

        Args:
          x: values, batch first.
          deterministic: overrides the layer's mode.
          rngs: overrides the layer's stream: ``Rngs`` with a ``dropout`` stream, a stream, or a
            key. Steps of one sequence need one key.
          mask: booleans ``(N, C)`` or what broadcasts to ``x``, true where a feature is kept,
            instead of a draw.

        Returns:
          An array of the shape of ``x``.
        """
        check(
            x.ndim in (2, 3),
            "recurrent dropout needs (N, T, C) or one step (N, C)",
            fix="Reshape the features to one axis.",
            shape=x.shape,
        )
        if mask is not None and mask.ndim == 2 and x.ndim == 3:
            mask = mask[:, None]  # (N, C) -> (N, 1, C)
        features = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        return self._drop(x, features, deterministic, rngs, mask)


class RecurrentDropoutCell(nnx.RNNCellBase):
    """Gives a recurrent cell dropout of its hidden state, by one mask for the whole sequence.

    Same result as ``torch_ref.dropout.VariationalLSTM`` with the same mask: the hidden state is
    dropped and scaled before every step, the cell state of an LSTM and the outputs are not. The
    key travels in the carry, ``(the cell's carry, key)``, so that ``nnx.RNN`` and any scan drop
    the same at every step, and nothing else is kept for the backward pass.

    Args:
      cell: any cell whose carry is its hidden state, or a tuple of which that is the last:
        ``nnx.OptimizedLSTMCell``, ``nnx.LSTMCell``, ``nnx.GRUCell``, ``nnx.SimpleCell``.
      p: the probability of dropping an element of the state, in [0, 1].
      deterministic: whether to start in evaluation mode.
      dtype: dtype of the dropped state; ``None`` = that of the state.
      param_dtype: accepted like every layer's; there are no parameters beside the cell's.
      rngs: source of the keys; a stream of its own is forked from ``dropout``.

    Raises:
      ValueError: if ``p`` is outside [0, 1], training needs a key and there is none, or a carry is
        not what :meth:`initialize_carry` or :meth:`start` returns.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> cell = RecurrentDropoutCell(nnx.OptimizedLSTMCell(3, 5, rngs=rngs), 0.5, rngs=rngs)
      >>> nnx.RNN(cell)(jnp.ones((2, 7, 3))).shape
      (2, 7, 5)

    Differs from:
      Keras's ``recurrent_dropout``, which draws one mask for each gate of an LSTM.

    Reference:
      Y. Gal, Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
      Networks", 2016, arXiv:1512.05287 (section 4.2).
    """

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        p: float,
        *,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.cell = cell
        self.drop = RecurrentDropout(
            p, deterministic=deterministic, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    @property
    def num_feature_axes(self) -> int:
        """That of the cell."""
        return self.cell.num_feature_axes

    def initialize_carry(
        self,
        input_shape: Shape,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Carry:
        """Returns the carry that begins a sequence, with a key of its own.

        Args:
          input_shape: that of one step's input.
          rngs: source of the cell's initial state, stream ``carry``; not of the mask.
          carry_init: draws the initial state.
        """
        options = {} if carry_init is None else {"carry_init": carry_init}
        return self.start(self.cell.initialize_carry(input_shape, rngs, **options))

    def start(self, carry: PyTree, *, rngs: Source = None, mask: Array | None = None) -> Carry:
        """Returns the carry that begins a sequence at a given carry of the cell.

        Args:
          carry: the cell's own carry.
          rngs: overrides the stream of the mask's key, as in :class:`RecurrentDropout`.
          mask: booleans of the hidden state's shape, true where it is kept, instead of a key.
        """
        if mask is not None:
            return carry, mask
        key = self.drop.next_key(rngs=rngs)
        # An axis in front, for nnx.RNN selects among a carry's last ones by sample: seq_lengths.
        return carry, None if key is None else key[None]

    def __call__(self, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
        """Makes one step.

        Args:
          carry: what :meth:`initialize_carry`, :meth:`start` or the last step returned.
          inputs: the step's input, as the cell takes it.

        Returns:
          The next carry, and the cell's output.
        """
        inner, source = _checked(carry)
        inner, output = self.cell(self._dropped(inner, source), inputs)
        return (inner, source), output

    def _dropped(self, inner: PyTree, source: Array | None) -> PyTree:
        if source is None:
            check(
                not self.drop._drops(),
                "a sequence in training must begin in training",
                fix="Begin it anew: initialize_carry, or start(carry).",
                key=source,
            )
            return inner
        *rest, h = inner if isinstance(inner, tuple) else (inner,)
        mask, key = (source, None) if source.dtype == jnp.bool_ else (None, source[0])
        h = self.drop._drop(h, h.shape, None, key, mask)
        return (*rest, h) if isinstance(inner, tuple) else h


def _checked(carry: Carry) -> Carry:
    """Returns a carry, which must be a pair with a key, a mask or ``None`` behind."""
    pair = isinstance(carry, tuple) and len(carry) == 2
    source = carry[1] if pair else carry
    kinds = (jax.dtypes.prng_key, jnp.uint32, jnp.bool_)
    fits = source is None or any(
        isinstance(source, Array) and jnp.issubdtype(source.dtype, kind) for kind in kinds
    )
    check(
        pair and fits,
        "a carry must be (the cell's carry, key)",
        fix="Begin a sequence with initialize_carry, or with start(carry).",
        carry=type(carry).__name__,
    )
    return carry
