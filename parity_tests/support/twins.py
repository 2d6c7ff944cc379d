"""Every layer that interop carries, with its twin in torch and how both are called."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flaxstab import attention, blocks, dropout, linear, models, norms
from flaxstab.blocks._residual import Add
from parity_tests.support.layers import channels_first, channels_last, image
from torch_ref import blocks as torch_blocks
from torch_ref import dropout as torch_dropout
from torch_ref import models as torch_models
from torch_ref import norms as torch_norms

R = nnx.Rngs(0)
T = torch.nn
Call = Callable[..., object]


class Row(NamedTuple):
    """A layer and its twin in torch, and how both are called in float64.

    Attributes:
      ours: makes the Flax layer.
      theirs: makes torch's.
      shapes: of the inputs, features last.
      call: of the Flax layer, on the inputs.
      twin: of torch's layer, on the inputs as tensors.
    """

    ours: Callable[[], nnx.Module]
    theirs: Callable[[], T.Module]
    shapes: tuple[tuple[int, ...], ...]
    call: Call = lambda layer, *inputs: layer(*inputs)
    twin: Call = lambda layer, *inputs: layer(*inputs)


def _image(ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module], *shape: int) -> Row:
    return Row(ours, theirs, (shape,), twin=lambda layer, x: image(layer)(x))


def _softmax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, **_: object
) -> jax.Array:
    """Attention in the input's dtype: the stock one computes its softmax in float32."""
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), value)


def _attention(bias: bool = True, keys: int | None = None) -> Row:
    sizes = (4,) if keys is None else (4, None, None, None, keys)

    def ours() -> nnx.Module:
        return nnx.MultiHeadAttention(
            2, *sizes, use_bias=bias, decode=False, attention_fn=_softmax_attention, rngs=R
        )

    def theirs() -> T.Module:
        return T.MultiheadAttention(4, 2, bias=bias, kdim=keys, vdim=keys, batch_first=True)

    shapes = ((2, 3, 4), (2, 5, keys or 4), (2, 5, keys or 4))
    # Small inputs: a softmax of large logits would pick one key and hide the others.
    return Row(
        ours,
        theirs,
        shapes,
        lambda layer, *xs: layer(*(x / 20 for x in xs)),
        lambda layer, *xs: layer(*(x / 20 for x in xs))[0],
    )


def _own_attention(keys: int = 4, bias: bool = True, more: bool = False) -> Row:
    options = (0.0, bias, more, more, keys, keys + 1 if keys != 4 else 4)
    shapes = ((2, 3, 4), (2, 5, keys), (2, 5, options[-1]))
    return Row(
        lambda: attention.MultiHeadAttention(4, 2, *options, rngs=R),
        lambda: T.MultiheadAttention(4, 2, *options, batch_first=True),
        shapes,
        lambda layer, *xs: layer(*(x / 20 for x in xs)),
        lambda layer, *xs: layer(*(x / 20 for x in xs))[0],
    )


def _lstm_cell(cell: Callable[[], nnx.Module], size: int = 3) -> Row:
    return Row(
        cell,
        lambda: T.LSTMCell(size, 4),
        ((2, size), (2, 4), (2, 4)),
        lambda layer, x, c, h: jnp.concatenate(layer((c / 5, h / 5), x / 5)[0]),
        lambda layer, x, c, h: torch.cat(layer(x / 5, (h / 5, c / 5))[::-1]),
    )


def _rnn(ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]) -> Row:
    return Row(
        ours,
        theirs,
        ((2, 5, 3),),
        lambda layer, x: layer(x / 5),
        lambda layer, x: layer(x / 5)[0],
    )


def _both(cell: Callable[[], nnx.Module]) -> nnx.Module:
    return nnx.Bidirectional(nnx.RNN(cell()), nnx.RNN(cell()))


def _simple(size: int = 3) -> nnx.Module:
    return nnx.SimpleCell(size, 4, rngs=R)


def _transposed(size: int, out: int, window: tuple[int, ...], flip: bool) -> nnx.Module:
    padding = [(k - 2, k - 2) for k in window]  # torch's padding=1: dilation * (k - 1) - 1
    strides = (2,) * len(window)
    options = {"padding": padding, "transpose_kernel": flip, "rngs": R}
    return nnx.ConvTranspose(size, out, window, strides, **options)


TRANSPOSED: dict[str, Callable[..., nnx.Module]] = {
    "conv transpose": lambda *sizes: linear.ConvTranspose(*sizes, 2, 1, rngs=R),
    "nnx conv transpose flipped": lambda *sizes: _transposed(*sizes, flip=False),
    "nnx conv transpose transposed": lambda *sizes: _transposed(*sizes, flip=True),
}


def _evaluated(layer: nnx.Module, x: jax.Array) -> jax.Array:
    layer.eval()
    return layer(x)


def _normed(ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]) -> Row:
    return Row(ours, theirs, ((5, 3, 2, 4),), _evaluated, lambda t, x: image(t.eval())(x))


def _looked_up(ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]) -> Row:
    return Row(
        ours,
        theirs,
        ((2, 3),),
        lambda layer, x: layer(jnp.asarray(jnp.abs(x) % 7, int)),
        lambda layer, x: layer((x.abs() % 7).long()),
    )


X = (2, 5, 6, 4)  # an image with 4 channels
LAYERS: dict[str, Row] = {
    "linear": Row(lambda: linear.Linear(3, 5, rngs=R), lambda: T.Linear(3, 5), ((2, 3),)),
    "linear no bias": Row(
        lambda: linear.Linear(3, 5, False, rngs=R), lambda: T.Linear(3, 5, False), ((2, 3),)
    ),
    "square": Row(lambda: linear.Linear(4, 4, rngs=R), lambda: T.Linear(4, 4), ((2, 4),)),
    "conv1d": _image(
        lambda: linear.Conv(4, 6, (3,), rngs=R), lambda: T.Conv1d(4, 6, 3), 2, 7, 4
    ),
    "conv2d": _image(lambda: linear.Conv(4, 6, (3, 2), rngs=R), lambda: T.Conv2d(4, 6, (3, 2)), *X),
    "conv2d square": _image(lambda: linear.Conv(4, 4, 4, rngs=R), lambda: T.Conv2d(4, 4, 4), *X),
    "conv3d": _image(
        lambda: linear.Conv(4, 6, (3, 2, 1), rngs=R), lambda: T.Conv3d(4, 6, (3, 2, 1)),
        2, 5, 4, 3, 4,
    ),
    "groups": _image(
        lambda: linear.Conv(4, 6, 3, groups=2, rngs=R), lambda: T.Conv2d(4, 6, 3, groups=2), *X
    ),
    "depthwise": _image(
        lambda: linear.Conv(4, 8, 3, groups=4, rngs=R), lambda: T.Conv2d(4, 8, 3, groups=4), *X
    ),
    "conv transpose groups": _image(
        lambda: linear.ConvTranspose(4, 6, 3, groups=2, rngs=R),
        lambda: T.ConvTranspose2d(4, 6, 3, groups=2), *X,
    ),
    "conv transpose depthwise": _image(
        lambda: linear.ConvTranspose(4, 4, 3, groups=4, rngs=R),
        lambda: T.ConvTranspose2d(4, 4, 3, groups=4), *X,
    ),
    "embed": _looked_up(lambda: linear.Embed(7, 7, rngs=R), lambda: T.Embedding(7, 7)),
    "embed padded": _looked_up(
        lambda: linear.Embed(7, 5, -2, rngs=R), lambda: T.Embedding(7, 5, -2)
    ),
    "batch": _normed(lambda: norms.BatchNorm(4), lambda: T.BatchNorm2d(4)),
    "batch plain": _normed(
        lambda: norms.BatchNorm(4, affine=False), lambda: T.BatchNorm2d(4, affine=False)
    ),
    "batch untracked": _normed(
        lambda: norms.BatchNorm(4, track_running_stats=False),
        lambda: T.BatchNorm2d(4, track_running_stats=False),
    ),
    "ghost": _normed(lambda: norms.GhostBatchNorm(4, 2), lambda: T.BatchNorm2d(4)),
    "instance": _normed(lambda: norms.InstanceNorm(4), lambda: T.InstanceNorm2d(4)),
    "instance tracked": _normed(
        lambda: norms.InstanceNorm(4, affine=True, track_running_stats=True),
        lambda: T.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ),
    "frozen": _normed(
        lambda: norms.FrozenBatchNorm(4), lambda: torch_norms.FrozenBatchNorm(4)
    ),
    "rms": Row(
        lambda: norms.RMSNorm((3, 4)), lambda: T.RMSNorm((3, 4)), ((2, 3, 4),)
    ),
    "layer": Row(lambda: norms.LayerNorm((3, 4)), lambda: T.LayerNorm((3, 4)), ((2, 3, 4),)),
    "layer no bias": Row(
        lambda: norms.LayerNorm(4, bias=False), lambda: T.LayerNorm(4, bias=False), ((2, 3, 4),)
    ),
    "group": _normed(lambda: norms.GroupNorm(2, 4), lambda: T.GroupNorm(2, 4)),
    "attention": _own_attention(),
    "attention no bias": _own_attention(bias=False),
    "attention other keys": _own_attention(keys=6, more=True),
    "dropout": Row(
        lambda: dropout.Dropout(0.5, rngs=R), lambda: T.Dropout(0.5), ((2, 3),), _evaluated,
        lambda t, x: t.eval()(x),
    ),
    "channel dropout": Row(
        lambda: dropout.ChannelDropout(0.5, rngs=R), lambda: T.Dropout2d(0.5), ((2, 4, 5, 3),),
        _evaluated, lambda t, x: t.eval()(x),
    ),
    "alpha dropout": Row(
        lambda: dropout.AlphaDropout(0.5, rngs=R), lambda: T.AlphaDropout(0.5), ((2, 3),),
        _evaluated, lambda t, x: t.eval()(x),
    ),
    "drop path": Row(
        lambda: dropout.DropPath(0.5, rngs=R), lambda: torch_dropout.DropPath(0.5), ((2, 3),),
        _evaluated, lambda t, x: t.eval()(x),
    ),
    "recurrent dropout": Row(
        lambda: dropout.RecurrentDropout(0.5, rngs=R), lambda: torch_dropout.RecurrentDropout(0.5),
        ((2, 5, 3),), _evaluated, lambda t, x: t.eval()(x),
    ),
    "recurrent dropout cell": Row(
        lambda: dropout.RecurrentDropoutCell(nnx.OptimizedLSTMCell(3, 4, rngs=R), 0.5, rngs=R),
        lambda: torch_dropout.VariationalLSTM(3, 4), ((2, 5, 3),),
        lambda layer, x: _evaluated(nnx.RNN(layer), x / 5), lambda t, x: t.eval()(x / 5),
    ),
    "layer scale": Row(
        lambda: Add(blocks.Residual(scale=0.1, layer_scale=0.5), 4),
        lambda: torch_blocks.Add(0.1, 0.5, 4),
        (X, X),
        twin=lambda t, *xs: channels_last(t(*map(channels_first, xs))),
    ),
    "nnx linear": Row(lambda: nnx.Linear(3, 5, rngs=R), lambda: T.Linear(3, 5), ((2, 3),)),
    "nnx linear no bias": Row(
        lambda: nnx.Linear(3, 5, use_bias=False, rngs=R), lambda: T.Linear(3, 5, False), ((2, 3),)
    ),
    "nnx linear general": Row(
        lambda: nnx.LinearGeneral(4, 4, rngs=R), lambda: T.Linear(4, 4), ((2, 4),)
    ),
    "nnx linear general no bias": Row(
        lambda: nnx.LinearGeneral(3, 5, use_bias=False, rngs=R), lambda: T.Linear(3, 5, False),
        ((2, 3),),
    ),
    "nnx conv": _image(
        lambda: nnx.Conv(4, 6, (3, 2), padding="VALID", rngs=R), lambda: T.Conv2d(4, 6, (3, 2)), *X
    ),
    "nnx conv square": _image(
        lambda: nnx.Conv(4, 4, (4, 4), padding="VALID", rngs=R), lambda: T.Conv2d(4, 4, 4), *X
    ),
    **{
        f"{kind} {name}": _image(
            lambda make=make, out=out, window=window: make(4, out, window),
            lambda out=out, window=window, twin=twin: twin(4, out, window, 2, 1),
            2, *(5, 6, 3)[: len(window)], 4,
        )
        for kind, make in TRANSPOSED.items()
        for name, out, window, twin in (
            ("1d", 6, (3,), T.ConvTranspose1d),
            ("2d", 6, (3, 2), T.ConvTranspose2d),
            ("square", 4, (4, 4), T.ConvTranspose2d),
            ("3d", 3, (3, 2, 4), T.ConvTranspose3d),
        )
    },
    "nnx batch": _normed(
        lambda: nnx.BatchNorm(4, rngs=R), lambda: T.BatchNorm2d(4)
    ),
    "nnx layer": Row(
        lambda: nnx.LayerNorm(4, epsilon=1e-5, rngs=R), lambda: T.LayerNorm(4), ((2, 3, 4),)
    ),
    "nnx layer no bias": Row(
        lambda: nnx.LayerNorm(4, epsilon=1e-5, use_bias=False, rngs=R),
        lambda: T.LayerNorm(4, bias=False), ((2, 3, 4),),
    ),
    "nnx group": _normed(
        lambda: nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, rngs=R), lambda: T.GroupNorm(2, 4)
    ),
    "nnx rms": Row(
        lambda: nnx.RMSNorm(4, epsilon=1e-5, rngs=R), lambda: T.RMSNorm(4, 1e-5), ((2, 3, 4),)
    ),
    "nnx instance": _normed(
        lambda: nnx.InstanceNorm(4, epsilon=1e-5, rngs=R),
        lambda: T.InstanceNorm2d(4, affine=True),
    ),
    "nnx embed": _looked_up(lambda: nnx.Embed(7, 7, rngs=R), lambda: T.Embedding(7, 7)),
    "nnx prelu": Row(nnx.PReLU, T.PReLU, ((2, 30),)),
    "nnx dropout": Row(
        lambda: nnx.Dropout(0.5, rngs=R), lambda: T.Dropout(0.5), ((2, 3),), _evaluated,
        lambda t, x: t.eval()(x),
    ),
    "nnx attention": _attention(),
    "nnx attention no bias": _attention(bias=False),
    "nnx attention other keys": _attention(keys=6),
    "nnx lstm cell": _lstm_cell(lambda: nnx.LSTMCell(3, 4, rngs=R)),
    "nnx lstm cell square": _lstm_cell(lambda: nnx.LSTMCell(4, 4, rngs=R), 4),
    "nnx optimized lstm cell": _lstm_cell(lambda: nnx.OptimizedLSTMCell(3, 4, rngs=R)),
    "nnx simple cell": Row(
        lambda: _simple(4), lambda: T.RNNCell(4, 4), ((2, 4), (2, 4)),
        lambda layer, x, h: layer(h / 5, x / 5)[0], lambda layer, x, h: layer(x / 5, h / 5),
    ),
    "nnx rnn": _rnn(lambda: nnx.RNN(_simple()), lambda: T.RNN(3, 4, batch_first=True)),
    "nnx lstm": _rnn(
        lambda: nnx.RNN(nnx.LSTMCell(3, 4, rngs=R)), lambda: T.LSTM(3, 4, batch_first=True)
    ),
    "nnx bidirectional": _rnn(
        lambda: _both(lambda: nnx.OptimizedLSTMCell(3, 4, rngs=R)),
        lambda: T.LSTM(3, 4, batch_first=True, bidirectional=True),
    ),
}  # fmt: skip
WHOLE = {
    "small cnn": (lambda: models.SmallCNN(rngs=R), torch_models.SmallCNN),
    "cnn bn": (lambda: models.CNN_BN(rngs=R), torch_models.CNN_BN),
    "cnn ln": (lambda: models.CNN_LN(rngs=R), torch_models.CNN_LN),
    "stable cnn": (
        lambda: models.StableCNN("batch", widths=(4, 6), image_size=8, rngs=R),
        lambda: torch_models.StableCNN("batch", widths=(4, 6), image_size=8),
    ),
}
EXACT = WHOLE | {name: row[:2] for name, row in LAYERS.items() if name != "nnx batch"}
