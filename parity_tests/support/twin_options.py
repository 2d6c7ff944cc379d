"""Layers with options that change what they hold: more rows for the round trip of weights."""

from collections.abc import Callable

from flax import nnx

from flaxstab import attention, blocks, linear, norms
from parity_tests.support.twins import R, T
from torch_ref import blocks as torch_blocks
from torch_ref import norms as torch_norms

Makers = tuple[Callable[[], nnx.Module], Callable[[], T.Module]]

_CONVS = (T.Conv1d, T.Conv2d, T.Conv3d)
_BACK = (T.ConvTranspose1d, T.ConvTranspose2d, T.ConvTranspose3d)


def _conv(rank: int, groups: int, bias: bool) -> dict[str, Makers]:
    window, name = (3, 2, 4)[:rank], f"{rank}d groups={groups} bias={bias}"
    sizes, last = (4, 8, window), (1, 0, 1, groups, bias)

    def stock() -> nnx.Module:
        return nnx.Conv(*sizes, feature_group_count=groups, use_bias=bias, rngs=R)

    def back(flip: bool) -> nnx.Module:
        return nnx.ConvTranspose(*sizes, use_bias=bias, transpose_kernel=flip, rngs=R)

    rows: dict[str, Makers] = {
        f"conv {name}": (
            lambda: linear.Conv(*sizes, *last, rngs=R), lambda: _CONVS[rank - 1](*sizes, *last)
        ),
        f"conv transpose {name}": (
            lambda: linear.ConvTranspose(*sizes, 1, 0, 0, groups, bias, rngs=R),
            lambda: _BACK[rank - 1](*sizes, 1, 0, 0, groups, bias),
        ),
        f"nnx conv {name}": (stock, lambda: _CONVS[rank - 1](*sizes, *last)),
    }  # fmt: skip
    for flip in (False, True) if groups == 1 else ():
        rows[f"nnx conv transpose {name} flip={flip}"] = (
            lambda flip=flip: back(flip),
            lambda: _BACK[rank - 1](*sizes, bias=bias),
        )
    return rows


def _norms() -> dict[str, Makers]:
    off = {"affine": False}
    rows: dict[str, Makers] = {
        "batch no bias": (
            lambda: norms.BatchNorm(4, bias=False), lambda: T.BatchNorm2d(4, bias=False)
        ),
        "ghost plain": (
            lambda: norms.GhostBatchNorm(4, 2, **off), lambda: T.BatchNorm2d(4, **off)
        ),
        "instance affine": (
            lambda: norms.InstanceNorm(4, affine=True), lambda: T.InstanceNorm2d(4, affine=True)
        ),
        "instance only tracked": (
            lambda: norms.InstanceNorm(4, track_running_stats=True),
            lambda: T.InstanceNorm2d(4, track_running_stats=True),
        ),
        "group plain": (lambda: norms.GroupNorm(2, 4, **off), lambda: T.GroupNorm(2, 4, **off)),
        "layer plain": (
            lambda: norms.LayerNorm((3, 4), elementwise_affine=False),
            lambda: T.LayerNorm((3, 4), elementwise_affine=False),
        ),
        "rms plain": (
            lambda: norms.RMSNorm(4, elementwise_affine=False),
            lambda: T.RMSNorm(4, elementwise_affine=False),
        ),
        "frozen wide": (lambda: norms.FrozenBatchNorm(9), lambda: torch_norms.FrozenBatchNorm(9)),
        "nnx layer plain": (
            lambda: nnx.LayerNorm(4, use_bias=False, use_scale=False, rngs=R),
            lambda: T.LayerNorm(4, elementwise_affine=False),
        ),
        "nnx group plain": (
            lambda: nnx.GroupNorm(4, 2, use_bias=False, use_scale=False, rngs=R),
            lambda: T.GroupNorm(2, 4, affine=False),
        ),
    }  # fmt: skip
    return rows


_ATTENTION = ((True, True, 4, 4), (False, True, 6, 4), (True, False, 4, 5), (False, False, 6, 5))


def _attention(bias: bool, more: bool, kdim: int, vdim: int) -> dict[str, Makers]:
    options = (0.0, bias, more, False, kdim, vdim)
    return {
        f"attention bias={bias} kv={more} kdim={kdim} vdim={vdim}": (
            lambda: attention.MultiHeadAttention(4, 2, *options, rngs=R),
            lambda: T.MultiheadAttention(4, 2, *options),
        )
    }


def _recurrent() -> dict[str, Makers]:
    cells = {
        "lstm": (lambda: nnx.LSTMCell(3, 4, rngs=R), T.LSTMCell, T.LSTM),
        "optimized lstm": (lambda: nnx.OptimizedLSTMCell(3, 4, rngs=R), T.LSTMCell, T.LSTM),
        "simple": (lambda: nnx.SimpleCell(3, 4, rngs=R), T.RNNCell, T.RNN),
    }
    rows: dict[str, Makers] = {}
    for name, (make, cell, whole) in cells.items():
        rows |= {
            f"{name} cell": (make, lambda cell=cell: cell(3, 4)),
            f"{name} layer": (lambda make=make: nnx.RNN(make()), lambda whole=whole: whole(3, 4)),
            f"{name} both ways": (
                lambda make=make: nnx.Bidirectional(nnx.RNN(make()), nnx.RNN(make())),
                lambda whole=whole: whole(3, 4, bidirectional=True),
            ),
        }
    return rows


def _wholes() -> dict[str, Makers]:
    layer = {"d_model": 4, "nhead": 2, "dim_feedforward": 6}
    rows: dict[str, Makers] = {
        "transformer block": (
            lambda: blocks.TransformerBlock(4, 2, rngs=R),
            lambda: torch_blocks.TransformerBlock(4, 2),
        ),
    }
    for bias in (True, False):
        rows |= {
            f"encoder layer bias={bias}": (
                lambda bias=bias: blocks.TransformerEncoderLayer(**layer, bias=bias, rngs=R),
                lambda bias=bias: T.TransformerEncoderLayer(**layer, bias=bias),
            ),
            f"decoder layer bias={bias}": (
                lambda bias=bias: blocks.TransformerDecoderLayer(**layer, bias=bias, rngs=R),
                lambda bias=bias: T.TransformerDecoderLayer(**layer, bias=bias),
            ),
        }
    return rows


OPTIONS: dict[str, Makers] = {
    **{
        name: makers
        for rank in (1, 2, 3)
        for groups, bias in ((1, False), (2, True), (4, False))
        for name, makers in _conv(rank, groups, bias).items()
    },
    **_norms(),
    **{name: makers for sizes in _ATTENTION for name, makers in _attention(*sizes).items()},
    **_recurrent(),
    **_wholes(),
}
