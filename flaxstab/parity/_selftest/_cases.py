"""The pairs that faults are planted in: layers and functions with their ordinary inputs.

Every entry builds both sides anew, so that no compiled program outlives a plant, and looks up what
it builds at that moment, so that a plant reaches it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional, linear, norms
from flaxstab._typing import Array, DTypeLike
from flaxstab.parity._inputs import Layout
from flaxstab.parity._selftest import _witness as witness
from flaxstab.parity._selftest._plant import Build, Function, Sides, torch_functional

if TYPE_CHECKING:
    import torch

DROP = 0.25
SMOOTHING = 0.1
PADDING = 2  # the row without a gradient
_LOW = (jnp.bfloat16,)

Dtypes = tuple[DTypeLike, ...]


def normal(*shape: int, seed: int = 0, offset: float = 3.0, scale: float = 2.0) -> np.ndarray:
    """Returns normal numbers, by default neither centred nor of unit variance."""
    return np.random.default_rng(seed).normal(offset, scale, shape)


def holed(x: np.ndarray, value: float) -> np.ndarray:
    """Returns a copy in which every 13th element has a value such as NaN."""
    places = np.arange(x.size).reshape(x.shape) % 13 == 5
    return np.where(places, value, x)


def drawn(module: "torch.nn.Module", seed: int = 7) -> "torch.nn.Module":
    """Draws all parameters of a module anew: scales of 1 and biases of 0 hide what is done to them.

    Returns:
      The module.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.tensor(rng.normal(0.5, 1.0, parameter.shape)))
    return module


def layout_of(x: np.ndarray) -> Layout:
    return "image" if x.ndim == 4 else None


def _layer(
    ours: Callable[[], nnx.Module],
    theirs: Callable[[], "torch.nn.Module"],
    formula: Function,
    x: np.ndarray,
    dtypes: Dtypes = (),
) -> Callable[[], Sides]:
    return Build(
        ours,
        lambda: drawn(theirs()),
        (x,),
        lambda layer: witness.plain(layer, formula),
        layout_of(x),
        dtypes,
    )


def function(
    ours: Callable[..., Array],
    theirs: Function,
    formula: Function,
    *inputs: np.ndarray,
    dtypes: Dtypes = (),
) -> Callable[[], Sides]:
    return Build(
        # A new function each time: JAX keeps what it compiled for as long as the function lives.
        lambda: functools.partial(ours),
        lambda: theirs,
        inputs,
        lambda _: formula,
        layout_of(inputs[0]),
        dtypes,
    )


def _torch_nn(name: str, *arguments: object, **options: object) -> Callable[[], "torch.nn.Module"]:
    def build() -> "torch.nn.Module":
        import torch

        return vars(torch.nn)[name](*arguments, **options)

    return build


def _layer_norm(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    from torch_ref import functional as plain

    return plain.layer_norm(x, layer.weight.shape, layer.weight, layer.bias)


def _group_norm(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    from torch_ref import functional as plain

    return plain.group_norm(x, 2, layer.weight, layer.bias)


def _rms_norm(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    import torch

    eps = torch.finfo(x.dtype).eps
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * layer.weight


def affine(layer: "torch.nn.Module", x: "torch.Tensor") -> "torch.Tensor":
    return x @ layer.weight.T + layer.bias


def _conv(seed: int, options: Mapping[str, int], *, same: bool = False) -> Callable[[], Sides]:
    given = {**options, "padding": "same"} if same else options
    return _layer(
        lambda: linear.Conv(4, 4, 3, **given, rngs=nnx.Rngs(0)),
        _torch_nn("Conv2d", 4, 4, 3, **given),
        lambda layer, x: witness.conv(x, layer.weight, layer.bias, **options),
        normal(2, 6, 6, 4, seed=seed),
    )


def _conv_transpose(seed: int, groups: int) -> Callable[[], Sides]:
    options = (2, 1, 1, groups)  # stride, padding, output padding
    return _layer(
        lambda: linear.ConvTranspose(4, 4, 3, *options, rngs=nnx.Rngs(0)),
        _torch_nn("ConvTranspose2d", 4, 4, 3, *options),
        lambda layer, x: witness.conv_transpose(x, layer.weight, layer.bias, *options),
        normal(2, 3, 3, 4, seed=seed),
    )


def _embedding() -> Callable[[], Sides]:
    return _layer(
        lambda: linear.Embed(7, 4, padding_idx=PADDING, rngs=nnx.Rngs(0)),
        _torch_nn("Embedding", 7, 4, padding_idx=PADDING),
        lambda layer, ids: witness.embedding(ids, layer.weight, PADDING),
        np.array([[0, 2, 5], [6, 2, 5]]),
    )


def _adaptive(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    for axis in (2, 3):  # 3 overlapping windows of 3 over 7 elements
        parts = [x.narrow(axis, start, 3).mean(axis) for start in (0, 2, 4)]
        x = torch.stack(parts, axis)
    return x


_CLASSES = normal(5, seed=11, offset=2.0, scale=0.3)
_LABELS = np.array([0, 3, -100, 1, 4, -100, 2, 2, 0, 1])
_LOGITS = normal(10, 5, seed=12, offset=0.0)


def _losses() -> dict[str, Callable[[], Sides]]:
    def weights(like: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.tensor(_CLASSES).to(like.dtype)

    return {
        "cross entropy": function(
            lambda x, y: functional.cross_entropy(x, y, label_smoothing=SMOOTHING),
            lambda x, y: torch_functional().cross_entropy(x, y, label_smoothing=SMOOTHING),
            lambda x, y: witness.cross_entropy(x, y, SMOOTHING),
            _LOGITS, _LABELS,
        ),
        "cross entropy, classes weighted": function(
            lambda x, y: functional.cross_entropy(
                x, y, weight=jnp.asarray(_CLASSES, x.dtype)
            ),
            lambda x, y: torch_functional().cross_entropy(x, y, weight=weights(x)),
            lambda x, y: witness.cross_entropy(x, y, 0.0, weights(x)),
            _LOGITS, _LABELS,
        ),
        # Beyond 88 the exponential overflows in float32.
        "cross entropy, large logits": function(
            lambda x, y: functional.cross_entropy(x, y),  # noqa: PLW0108 (looked up when called)
            lambda x, y: torch_functional().cross_entropy(x, y),
            lambda x, y: witness.cross_entropy(x, y, 0.0),
            60 * _LOGITS, _LABELS, dtypes=(np.float32,),
        ),
    }  # fmt: skip


def _norms() -> dict[str, Callable[[], Sides]]:
    def layer_norm(x: np.ndarray, dtypes: Dtypes = ()) -> Callable[[], Sides]:
        features = x.shape[-1]
        theirs = _torch_nn("LayerNorm", features)
        return _layer(lambda: norms.LayerNorm(features), theirs, _layer_norm, x, dtypes)

    def batch_norm(dtypes: Dtypes = ()) -> Callable[[], Sides]:
        theirs, x = _torch_nn("BatchNorm2d", 4), normal(3, 4, 4, 4)
        return _layer(lambda: norms.BatchNorm(4), theirs, witness.batch_norm, x, dtypes)

    return {
        "batch norm": batch_norm(),
        "batch norm, bfloat16": batch_norm(dtypes=_LOW),
        "layer norm": layer_norm(normal(4, 5, 8)),
        "layer norm, bfloat16": layer_norm(normal(4, 512), dtypes=_LOW),
        # Activations stand as far from 0 behind a ReLU without a norm.
        "layer norm, mean 100": layer_norm(
            normal(8, 32, offset=100.0, scale=1.0), dtypes=(np.float32,)
        ),
        # Squares below 1, or eps would not show.
        "rms norm": _layer(
            lambda: norms.RMSNorm(8), _torch_nn("RMSNorm", 8), _rms_norm,
            normal(4, 5, 8, offset=0.3, scale=0.2),
        ),
        "group norm": _layer(
            lambda: norms.GroupNorm(2, 6), _torch_nn("GroupNorm", 2, 6), _group_norm,
            normal(3, 4, 4, 6),
        ),
        "instance norm": _layer(
            lambda: norms.InstanceNorm(4, affine=True, track_running_stats=True),
            _torch_nn("InstanceNorm2d", 4, affine=True, track_running_stats=True),
            witness.instance_norm, normal(3, 4, 4, 4),
        ),
    }  # fmt: skip


def _affine() -> dict[str, Callable[[], Sides]]:
    def dense(x: np.ndarray, dtypes: Dtypes = ()) -> Callable[[], Sides]:
        ours, theirs = lambda: linear.Linear(4, 4, rngs=nnx.Rngs(0)), _torch_nn("Linear", 4, 4)
        return _layer(ours, theirs, affine, x, dtypes)

    return {
        "linear": dense(normal(8, 4)),
        "linear, float32": dense(normal(8, 4), dtypes=(np.float32,)),
        "linear, bfloat16": dense(normal(8, 4), dtypes=_LOW),
        "linear of NaN": dense(holed(normal(8, 4), np.nan)),
        "conv": _conv(2, {"padding": 1}),
        "conv, stride 2": _conv(3, {"padding": 1, "stride": 2}),
        "conv, dilated": _conv(4, {"padding": 2, "dilation": 2}, same=True),
        "conv in groups": _conv(5, {"padding": 1, "groups": 2}),
        "conv transpose": _conv_transpose(6, 1),
        "conv transpose in groups": _conv_transpose(7, 2),
        "embedding": _embedding(),
    }


def _pooling() -> dict[str, Callable[[], Sides]]:
    around = normal(2, 6, 6, 3, seed=6, offset=0.0)

    def largest(x: "torch.Tensor") -> "torch.Tensor":
        # Not amax, which shares the gradient among equal maxima.
        return witness.windows(x, 2, 2, 1, float("-inf")).max(0).values

    def max_pool(x: np.ndarray) -> Callable[[], Sides]:
        return function(
            lambda x: functional.max_pool(x, 2, 2, 1),
            lambda x: torch_functional().max_pool2d(x, 2, 2, 1),
            largest, x,
        )  # fmt: skip

    return {
        "max pool": max_pool(around),
        "max pool of infinity": max_pool(holed(around, np.inf)),
        "avg pool": function(
            lambda x: functional.avg_pool(x, 3, 2, 1),
            lambda x: torch_functional().avg_pool2d(x, 3, 2, 1),
            lambda x: witness.windows(x, 3, 2, 1, 0.0).mean(0), normal(2, 6, 6, 3),
        ),
        "adaptive avg pool": function(
            lambda x: functional.adaptive_avg_pool(x, 3),
            lambda x: torch_functional().adaptive_avg_pool2d(x, 3),
            _adaptive, normal(2, 7, 7, 3),
        ),
    }  # fmt: skip


def layers() -> dict[str, Callable[[], Sides]]:
    """Returns the cases of layers and functions, each a function that builds its sides."""
    return {
        **_norms(),
        **_affine(),
        "gelu": function(
            lambda x: functional.gelu(x),  # noqa: PLW0108 - looked up when called
            lambda x: torch_functional().gelu(x), witness.gelu,
            normal(8, 4, offset=0.0),
        ),
        **_pooling(),
        **_losses(),
    }  # fmt: skip
