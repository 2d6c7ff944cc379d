"""Every layer's rule: each bit goes there and back, and the layer computes torch's function."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import dropout, interop, linear, models, norms
from flaxstab.interop import _entries, _rules
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, image
from torch_ref import models as torch_models

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
    return nnx.ConvTranspose(
        size,
        out,
        window,
        strides=(2,) * len(window),
        padding=[(k - 2, k - 2) for k in window],  # torch's padding=1: dilation * (k - 1) - 1
        transpose_kernel=flip,
        rngs=R,
    )


def _evaluated(layer: nnx.Module, x: jax.Array) -> jax.Array:
    layer.eval()
    return layer(x)


def _normed(ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]) -> Row:
    return Row(ours, theirs, ((5, 3, 2, 4),), _evaluated, lambda t, x: image(t.eval())(x))


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
    "layer": Row(lambda: norms.LayerNorm((3, 4)), lambda: T.LayerNorm((3, 4)), ((2, 3, 4),)),
    "layer no bias": Row(
        lambda: norms.LayerNorm(4, bias=False), lambda: T.LayerNorm(4, bias=False), ((2, 3, 4),)
    ),
    "group": _normed(lambda: norms.GroupNorm(2, 4), lambda: T.GroupNorm(2, 4)),
    "dropout": Row(
        lambda: dropout.Dropout(0.5, rngs=R), lambda: T.Dropout(0.5), ((2, 3),), _evaluated,
        lambda t, x: t.eval()(x),
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
        f"nnx conv transpose {kind} {name}": _image(
            lambda out=out, window=window, flip=flip: _transposed(4, out, window, flip),
            lambda out=out, window=window, twin=twin: twin(4, out, window, 2, 1),
            2, *(5, 6, 3)[: len(window)], 4,
        )
        for kind, flip in {"flipped": False, "transposed": True}.items()
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
    "nnx embed": Row(
        lambda: nnx.Embed(7, 7, rngs=R), lambda: T.Embedding(7, 7), ((2, 3),),
        lambda layer, x: layer(jnp.asarray(jnp.abs(x) % 7, int)),
        lambda layer, x: layer((x.abs() % 7).long()),
    ),
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


def shuffled(module: T.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state_dict of the module with values of its own in every tensor."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(np.asarray(rng.normal(1, 0.5, t.shape))).to(t.dtype)
        if t.is_floating_point()
        else torch.tensor(int(rng.integers(1, 100)))
        for name, t in module.state_dict().items()
    }


@pytest.mark.parametrize(("ours", "theirs"), EXACT.values(), ids=EXACT)
def test_a_round_trip_gives_back_every_bit_under_torchs_names(
    ours: Callable[[], nnx.Module], theirs: Callable[[], T.Module]
) -> None:
    model, tensors = ours(), shuffled(theirs())
    for name in tensors:
        if "bias_hh" in name:  # of the two biases only the sum matters, and only that is kept
            tensors[name] = torch.zeros_like(tensors[name])
            tensors[name.replace("bias_hh", "bias_ih")][0] = -0.0
    report = interop.load_state_dict(model, tensors)
    assert report.complete
    assert set(report.loaded) == set(tensors)
    assert not report.rounded
    back = interop.state_dict(model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tuple(tensor.shape)
        assert back[name].dtype == tensor.numpy().dtype
        assert back[name].tobytes() == np.ascontiguousarray(tensor.numpy()).tobytes(), name
    theirs().load_state_dict({n: torch.tensor(a) for n, a in back.items()}, strict=True)


def _variables(model: nnx.Module) -> dict[tuple[object, ...], np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {path: np.asarray(variable[...]) for path, variable in state}


@pytest.mark.parametrize("ours", [row.ours for row in LAYERS.values()], ids=LAYERS)
def test_the_way_out_and_in_gives_back_every_bit(ours: Callable[[], nnx.Module]) -> None:
    source, target = ours(), ours()
    drawn = nnx.to_flat_state(nnx.state(source, nnx.Not(nnx.RngState)))
    for seed, (_, variable) in enumerate(drawn):
        new = values(*variable.shape, seed=seed)
        variable[...] = jnp.asarray(new, variable[...].dtype)
    nnx.update(source, nnx.from_flat_state(drawn))
    expected, before = _variables(source), _variables(target)
    assert all((expected[path] != array).any() for path, array in before.items())
    report = interop.load_state_dict(target, interop.state_dict(source))
    assert report.complete
    found = _variables(target)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        assert found[path].tobytes() == array.tobytes(), path
    listed = {v for e in report.entries for v in e.variable.split(", ")}
    assert listed == {".".join(map(str, path)) for path in expected}


def _in_float64(row: Row) -> tuple[np.ndarray, torch.Tensor]:
    """Returns both sides' outputs for a random state_dict and random inputs."""
    inputs = [values(*shape, seed=n) for n, shape in enumerate(row.shapes)]
    inputs = [x - 3 if isinstance(row.theirs(), T.PReLU) else x for x in inputs]
    theirs = row.theirs().double()
    theirs.load_state_dict(shuffled(theirs))
    with jax.enable_x64(True):
        graph, state = nnx.split(row.ours())
        floats = jax.tree.map(
            lambda a: jnp.asarray(a, float) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
        )
        ours = nnx.merge(graph, floats)
        for _, module in nnx.iter_modules(ours):  # some pin a dtype, or start a carry in one
            for setting in {"dtype", "param_dtype"} & vars(module).keys():
                value = vars(module)[setting]
                setattr(module, setting, jnp.float64 if value == jnp.float32 else value)
        interop.load_state_dict(ours, theirs.state_dict())
        found = np.asarray(row.call(ours, *map(jnp.asarray, inputs)))
    with torch.no_grad():
        return found, row.twin(theirs, *map(torch.tensor, inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_the_loaded_layer_computes_torchs_function(name: str) -> None:
    assert_same(*_in_float64(LAYERS[name]))


@pytest.mark.parametrize(
    ("name", "module", "entry"),
    [
        ("square", linear.Linear, _entries.one("kernel", "weight")),
        ("conv2d square", linear.Conv, _entries.TRANSPOSED._replace(
            to_torch=_entries.FLIPPED.to_torch, to_flax=_entries.FLIPPED.to_flax)),
        ("nnx conv transpose flipped square", nnx.ConvTranspose, _entries.KERNEL),
        ("nnx conv transpose transposed square", nnx.ConvTranspose, _entries.FLIPPED),
        ("nnx linear general", nnx.LinearGeneral, _entries.one("kernel", "weight")),
    ],
)  # fmt: skip
def test_a_wrong_layout_of_a_square_kernel_is_caught(
    name: str, module: type[nnx.Module], entry: _entries.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_rules.RULES, module, _rules.Rule(lambda _: (entry, _entries.BIAS)))
    with pytest.raises(AssertionError, match="is above the bound"):
        assert_same(*_in_float64(LAYERS[name]))


def test_every_rule_has_a_row() -> None:
    tested = {type(row.ours()) for row in LAYERS.values()}
    refused = {nnx.GRUCell}  # test_a_layer_that_torch_has_not_is_refused_by_name
    by_doctests = {t for t in _rules.RULES if t.__module__ == _rules.__name__}
    assert set(_rules.RULES) - by_doctests == tested | refused


def test_every_layer_has_a_rule_or_is_refused() -> None:
    containers = {"Module", "List", "Dict", "Sequential", "RNNCellBase"}
    # test_a_layer_that_torch_has_not_is_refused_by_name; RoPE is newer, and holds a cache
    refused = {"Einsum", "LoRA", "LoRALinear", "WeightNorm", "SpectralNorm", "RoPE"}
    exported = [v for place in (nnx, linear, norms, dropout) for v in vars(place).values()]
    layers = {v for v in exported if isinstance(v, type) and issubclass(v, nnx.Module)}
    assert {layer.__name__ for layer in layers - _rules.RULES.keys()} <= containers | refused


def test_the_sum_of_two_biases_is_kept() -> None:
    model = nnx.OptimizedLSTMCell(3, 4, rngs=R)
    tensors = shuffled(T.LSTMCell(3, 4))
    report = interop.load_state_dict(model, tensors)
    entry = next(e for e in report.entries if e.name == "bias_hh")
    assert entry.variable == "dense_h.bias"
    assert entry.transform == "the sum, split by gate"
    out = interop.state_dict(model)
    assert out["bias_ih"].tolist() == (tensors["bias_ih"] + tensors["bias_hh"]).tolist()
    assert not out["bias_hh"].any()
