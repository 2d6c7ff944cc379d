"""``torch_rng.seed_parameters``: the weights of PyTorch's layers and models, every bit."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, models, norms
from flaxstab.attention import MultiHeadAttention
from flaxstab.torch_rng import Draw, Generator, Tensors, layer_rule, seed_parameters
from flaxstab.torch_rng._layers import DRAWS
from parity_tests.support.torch_bits import DTYPES, assert_same_bits, same_processor
from torch_ref import models as torch_models

pytestmark = same_processor

tnn = torch.nn
SEEDS = (0, 42, -1)
QR = {"recurrent_kernel_init": nnx.initializers.zeros}  # the default has no 16-bit form


def rngs() -> nnx.Rngs:
    return nnx.Rngs(7)


def assert_same_weights(ours: nnx.Module, theirs: tnn.Module) -> None:
    """Every tensor of PyTorch's has our bits; a recurrent cell's biases those of their sum."""
    found, expected = interop.state_dict(ours), dict(theirs.state_dict())
    for name in [name for name in expected if "bias_ih" in name]:
        other = name.replace("bias_ih", "bias_hh")
        expected[name] = expected[name] + expected[other]
        expected[other] = torch.zeros_like(expected[other])
    ignored = [n for n in expected if n.endswith("num_batches_tracked") and n not in found]
    assert sorted(found) == sorted(set(expected) - set(ignored))
    for name, array in found.items():
        assert_same_bits(array, expected[name])


class Case(NamedTuple):
    """A layer on both sides, of parameters in a dtype."""

    ours: Callable[[object], nnx.Module]
    theirs: Callable[[torch.dtype], tnn.Module]


def attention(ours: Callable[..., nnx.Module], theirs: dict[str, object], **own: object) -> Case:
    return Case(
        lambda d: ours(**own, param_dtype=d, rngs=rngs()),
        lambda d: tnn.MultiheadAttention(8, 2, **theirs, dtype=d),
    )


OWN, STOCK = partial(MultiHeadAttention, 8, 2), partial(nnx.MultiHeadAttention, 2, 8)
MORE = {"add_bias_kv": True, "kdim": 6, "vdim": 5}
LAYERS: dict[str, Case] = {
    "Linear": Case(
        lambda d: linear.Linear(7, 5, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Linear(7, 5, dtype=d),
    ),
    "Linear, no bias": Case(
        lambda d: linear.Linear(70, 33, bias=False, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Linear(70, 33, bias=False, dtype=d),
    ),
    "Conv1d": Case(
        lambda d: linear.Conv(3, 4, (5,), param_dtype=d, rngs=rngs()),
        lambda d: tnn.Conv1d(3, 4, 5, dtype=d),
    ),
    "Conv2d, groups": Case(
        lambda d: linear.Conv(6, 8, 3, groups=2, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Conv2d(6, 8, 3, groups=2, dtype=d),
    ),
    "Conv3d": Case(
        lambda d: linear.Conv(2, 3, (1, 2, 3), param_dtype=d, rngs=rngs()),
        lambda d: tnn.Conv3d(2, 3, (1, 2, 3), dtype=d),
    ),
    "ConvTranspose2d, groups": Case(
        lambda d: linear.ConvTranspose(6, 8, (3, 2), groups=2, param_dtype=d, rngs=rngs()),
        lambda d: tnn.ConvTranspose2d(6, 8, (3, 2), groups=2, dtype=d),
    ),
    "Embed": Case(
        lambda d: linear.Embed(9, 5, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Embedding(9, 5, dtype=d),
    ),
    "Embed, padding": Case(
        lambda d: linear.Embed(3, 4, padding_idx=-1, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Embedding(3, 4, padding_idx=-1, dtype=d),
    ),
    "BatchNorm": Case(
        lambda d: norms.BatchNorm(4, param_dtype=d), lambda d: tnn.BatchNorm2d(4, dtype=d)
    ),
    "MultiHeadAttention": attention(OWN, {}),
    "MultiHeadAttention, no bias": attention(OWN, {"bias": False}, bias=False),
    "MultiHeadAttention, keys of their own": attention(OWN, MORE, **MORE),
    "nnx.Linear": Case(
        lambda d: nnx.Linear(7, 5, param_dtype=d, rngs=rngs()), lambda d: tnn.Linear(7, 5, dtype=d)
    ),
    "nnx.LinearGeneral": Case(
        lambda d: nnx.LinearGeneral(7, 5, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Linear(7, 5, dtype=d),
    ),
    "nnx.Conv": Case(
        lambda d: nnx.Conv(4, 6, (3, 3), feature_group_count=2, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Conv2d(4, 6, 3, groups=2, dtype=d),
    ),
    "nnx.ConvTranspose": Case(
        lambda d: nnx.ConvTranspose(4, 6, (3, 2), param_dtype=d, rngs=rngs()),
        lambda d: tnn.ConvTranspose2d(4, 6, (3, 2), dtype=d),
    ),
    "nnx.ConvTranspose, not flipped": Case(
        lambda d: nnx.ConvTranspose(4, 6, (3,), transpose_kernel=True, param_dtype=d, rngs=rngs()),
        lambda d: tnn.ConvTranspose1d(4, 6, 3, dtype=d),
    ),
    "nnx.Embed": Case(
        lambda d: nnx.Embed(9, 5, param_dtype=d, rngs=rngs()),
        lambda d: tnn.Embedding(9, 5, dtype=d),
    ),
    "nnx.MultiHeadAttention": attention(STOCK, {}),
    "nnx.MultiHeadAttention, no bias": attention(STOCK, {"bias": False}, use_bias=False),
    "nnx.MultiHeadAttention, own keys": attention(STOCK, {"kdim": 6, "vdim": 6}, in_kv_features=6),
    "nnx.LSTMCell": Case(
        lambda d: nnx.LSTMCell(3, 5, param_dtype=d, rngs=rngs()),
        lambda d: tnn.LSTMCell(3, 5, dtype=d),
    ),
    "nnx.OptimizedLSTMCell": Case(
        lambda d: nnx.OptimizedLSTMCell(3, 5, param_dtype=d, **QR, rngs=rngs()),
        lambda d: tnn.LSTMCell(3, 5, dtype=d),
    ),
    "nnx.SimpleCell": Case(
        lambda d: nnx.SimpleCell(3, 5, param_dtype=d, **QR, rngs=rngs()),
        lambda d: tnn.RNNCell(3, 5, dtype=d),
    ),
    "nnx.RNN": Case(
        lambda d: nnx.RNN(nnx.LSTMCell(3, 5, param_dtype=d, rngs=rngs())),
        lambda d: tnn.LSTM(3, 5, dtype=d),
    ),
    "nnx.Bidirectional": Case(
        lambda d: nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(3, 5, param_dtype=d, rngs=rngs())),
            nnx.RNN(nnx.LSTMCell(3, 5, param_dtype=d, rngs=rngs())),
        ),
        lambda d: tnn.LSTM(3, 5, bidirectional=True, dtype=d),
    ),
    "nnx.PReLU": Case(lambda d: nnx.PReLU(param_dtype=d), lambda d: tnn.PReLU(dtype=d)),
    "nnx.LayerNorm": Case(
        lambda d: nnx.LayerNorm(4, param_dtype=d, rngs=rngs()), lambda d: tnn.LayerNorm(4, dtype=d)
    ),
}


class Behind(nnx.Module):
    """A layer, and a linear one behind it: whose bits show where the layer leaves the stream."""

    def __init__(self, make: Callable[[object], nnx.Module], dtype: object) -> None:
        self.layer = make(dtype)
        self.after = linear.Linear(3, 2, rngs=rngs())


class TorchBehind(tnn.Module):
    def __init__(self, make: Callable[[torch.dtype], tnn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = make(dtype)
        self.after = tnn.Linear(3, 2)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_draws_torchs_bits(name: str) -> None:
    assert_both_ways(LAYERS[name], torch.float32)


@pytest.mark.parametrize("name", ["Linear", "Embed", "MultiHeadAttention", "nnx.SimpleCell"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layers_draw_in_their_own_dtype(name: str, dtype: torch.dtype) -> None:
    assert_both_ways(LAYERS[name], dtype)


def assert_both_ways(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    theirs = TorchBehind(case.theirs, dtype)
    with jax.enable_x64(dtype == torch.float64):
        assert_same_weights(seed_parameters(lambda: Behind(case.ours, DTYPES[dtype]), 3), theirs)
        given = Behind(case.ours, DTYPES[dtype])
        assert seed_parameters(given, 3) is given
        assert_same_weights(given, theirs)


def test_every_type_that_draws_has_a_case() -> None:
    made = {
        type(m) for case in LAYERS.values() for _, m in nnx.iter_modules(case.ours(jnp.float32))
    }
    assert {t for t in DRAWS if t.__module__.startswith(("flax.", "flaxstab."))} <= made


class Block(nnx.Module):
    """Attributes in no alphabetical order, layers of every kind."""

    def __init__(self) -> None:
        self.stem = linear.Conv(3, 20, 3, bias=False, rngs=rngs())
        self.norm = norms.BatchNorm(20)
        self.embed = linear.Embed(11, 8, padding_idx=2, rngs=rngs())
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs())
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs()) for _ in range(11)])
        self.act = nnx.PReLU()
        self.body = nnx.Sequential(linear.Linear(8, 5, rngs=rngs()), jax.nn.relu)
        self.body_again = self.body


class TorchBlock(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = tnn.Conv2d(3, 20, 3, bias=False)
        self.norm = tnn.BatchNorm2d(20)
        self.embed = tnn.Embedding(11, 8, padding_idx=2)
        self.attention = tnn.MultiheadAttention(8, 2)
        self.layers = tnn.ModuleList([tnn.Linear(8, 8) for _ in range(11)])
        self.act = tnn.PReLU()
        self.body = tnn.Sequential(tnn.Linear(8, 5), tnn.ReLU())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_of_many_layers_has_torchs_bits(seed: int) -> None:
    torch.manual_seed(seed)
    theirs = TorchBlock()
    assert_same_weights(seed_parameters(Block, seed), theirs)
    assert_same_weights(seed_parameters(Block(), seed), theirs)


def test_one_bit_is_noticed() -> None:
    torch.manual_seed(0)
    theirs, ours = TorchBlock(), seed_parameters(Block, 0)
    kernel = ours.layers[10].kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.nextafter(kernel[0, 0], jnp.float32(1)))
    with pytest.raises(AssertionError):
        assert_same_weights(ours, theirs)


class ListFirst(nnx.Module):
    """Layers that are built before they are assigned."""

    def __init__(self) -> None:
        layers = [nnx.Linear(3, 3, rngs=rngs()) for _ in range(2)]
        self.head = nnx.Linear(3, 2, rngs=rngs())
        self.layers = nnx.List(layers)


class TorchListFirst(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [tnn.Linear(3, 3) for _ in range(2)]
        self.head = tnn.Linear(3, 2)
        self.layers = tnn.ModuleList(layers)


class Replaced(nnx.Module):
    """A layer that is built and thrown away, and an initialisation of the constructor's own."""

    def __init__(self) -> None:
        self.head = linear.Linear(3, 2, rngs=rngs())
        self.tail = linear.Linear(2, 3, rngs=rngs())
        self.head = linear.Linear(3, 4, rngs=rngs())
        self.tail.kernel[...] = 0.5 * self.tail.kernel[...]
        self.tail.bias[...] = jnp.ones(3)


class TorchReplaced(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = tnn.Linear(3, 2)
        self.tail = tnn.Linear(2, 3)
        self.head = tnn.Linear(3, 4)
        with torch.no_grad():
            self.tail.weight.mul_(0.5)
            self.tail.bias.fill_(1)


class Tied(nnx.Module):
    """The head takes over the embedding's parameter."""

    def __init__(self) -> None:
        self.head = linear.Embed(5, 4, rngs=rngs())
        self.embed = linear.Embed(5, 4, rngs=rngs())
        self.head.embedding = self.embed.embedding


class TorchTied(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = tnn.Embedding(5, 4)
        self.embed = tnn.Embedding(5, 4)
        self.head.weight = self.embed.weight


PAIRS = {
    "built before assigned": (ListFirst, TorchListFirst),
    "replaced, and set by the constructor": (Replaced, TorchReplaced),
    "tied": (Tied, TorchTied),
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_a_function_draws_in_step_whatever_the_constructor_does(
    ours: Callable[[], nnx.Module], theirs: Callable[[], tnn.Module]
) -> None:
    torch.manual_seed(1)
    assert_same_weights(seed_parameters(ours, 1), theirs())


def test_a_given_model_draws_in_the_order_of_assignment() -> None:
    torch.manual_seed(1)
    with pytest.raises(AssertionError):
        assert_same_weights(seed_parameters(ListFirst(), 1), TorchListFirst())


def resnet_rule(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    """Torchvision's: Kaiming by the fan out for convolutions, the last norm's weight 0."""
    if not isinstance(layer, linear.Conv):
        return {}
    shape = tensors["weight"].shape
    return {"weight": generator.kaiming_normal(shape, mode="fan_out", nonlinearity="relu")}


class Unit(nnx.Module):
    """A block whose counterpart ends its constructor with ``self.apply(...)``."""

    def __init__(self) -> None:
        self.second = linear.Conv(4, 4, 3, rngs=rngs())
        self.first = linear.Conv(4, 4, 3, bias=False, rngs=rngs())


class TorchUnit(tnn.Module):
    def __init__(self, rule: Callable[[tnn.Module], None]) -> None:
        super().__init__()
        self.second = tnn.Conv2d(4, 4, 3)
        self.first = tnn.Conv2d(4, 4, 3, bias=False)
        self.apply(rule)


class Units(nnx.Module):
    def __init__(self) -> None:
        self.stem = linear.Linear(2, 3, rngs=rngs())
        self.units = nnx.List([Unit() for _ in range(3)])
        self.head = linear.Linear(3, 2, rngs=rngs())


class TorchUnits(tnn.Module):
    def __init__(self, rule: Callable[[tnn.Module], None]) -> None:
        super().__init__()
        self.stem = tnn.Linear(2, 3)
        self.units = tnn.ModuleList([TorchUnit(rule) for _ in range(3)])
        self.head = tnn.Linear(3, 2)


def fan_out(module: tnn.Module) -> None:
    if isinstance(module, tnn.Conv2d):
        tnn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@pytest.mark.parametrize("make", [lambda make: make, lambda make: make()], ids=["built", "given"])
def test_rules_draw_again_after_the_whole_model_or_each_block(
    make: Callable[[Callable[[], nnx.Module]], object],
) -> None:
    torch.manual_seed(5)
    theirs = TorchUnits(fan_out)
    assert_same_weights(seed_parameters(make(Units), 5, then={Unit: resnet_rule}), theirs)
    torch.manual_seed(5)
    theirs = TorchUnits(lambda _: None).apply(fan_out)
    assert_same_weights(seed_parameters(make(Units), 5, then=resnet_rule), theirs)


DOCUMENTS = {
    "SmallCNN": (
        lambda: models.SmallCNN("gelu", rngs=rngs()),
        lambda: torch_models.SmallCNN("gelu"),
        layer_rule("gelu"),
    ),
    "StableCNN": (
        lambda: models.StableCNN("group", "elu", widths=(16, 32), image_size=8, rngs=rngs()),
        lambda: torch_models.StableCNN("group", "elu", widths=(16, 32), image_size=8),
        layer_rule("elu"),
    ),
    "CNN_BN": (lambda: models.CNN_BN(rngs=rngs()), torch_models.CNN_BN, None),
    "CNN_LN": (lambda: models.CNN_LN(rngs=rngs()), torch_models.CNN_LN, None),
}


@pytest.mark.parametrize(("ours", "theirs", "then"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_the_documents_models_have_torchs_bits(
    ours: Callable[[], nnx.Module],
    theirs: Callable[[], tnn.Module],
    then: Draw | None,
) -> None:
    torch.manual_seed(11)
    expected = theirs()
    assert_same_weights(seed_parameters(ours, 11, then=then), expected)
    assert_same_weights(seed_parameters(ours(), 11, then=then), expected)
