"""from_torch: the twin of a PyTorch module computes what the module does, in both modes."""

import copy
import inspect
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from flaxstab import attention, interop, linear, models, norms
from flaxstab.interop import _torch_functions, _torch_layers
from parity_tests.support.block_twins import (
    QUICKLY,
    Outcome,
    Pair,
    assert_outcome,
    drawn,
    our_outcomes,
    torch_outcome,
)
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.support.torch_modules import CASES, REFUSED, Doubled, Net, Renamed
from torch_ref.resnet import ResNet

PAIRS = {name: Pair(lambda **_: None, case.make, case.shape) for name, case in CASES.items()}


def from_torch(module: nn.Module, layout: str | None = "image") -> nnx.Module:
    with jax.enable_x64(True):
        return interop.from_torch(module, rngs=nnx.Rngs(0), layout=layout)


@pytest.fixture(scope="module")
def both() -> dict[str, tuple[Outcome, Outcome]]:
    modules = {name: drawn(pair) for name, pair in PAIRS.items()}
    twins = {name: from_torch(module) for name, module in modules.items()}
    ours = our_outcomes(PAIRS, twins)
    theirs = {n: torch_outcome(PAIRS[n], modules[n], twins[n]) for n in PAIRS}
    return {name: (ours[name], theirs[name]) for name in PAIRS}


@pytest.mark.parametrize("name", CASES)
def test_a_twin_computes_what_the_module_does(
    name: str, both: dict[str, tuple[Outcome, Outcome]]
) -> None:
    assert_outcome(*both[name])


def test_a_twin_that_differs_is_noticed(both: dict[str, tuple[Outcome, Outcome]]) -> None:
    ours, theirs = both["convolutional"]
    with pytest.raises(AssertionError):
        assert_outcome(ours, theirs._replace(evaluation=theirs.evaluation * (1 + 1e-11)))


def test_every_option_of_every_layer_is_tried() -> None:
    made = [case.make() for case in CASES.values()]
    made += [make() for make, _ in REFUSED.values()]
    made += [nn.Embedding(3, 2, 1), *ATTENTIONS.values(), nn.TransformerDecoderLayer(4, 2)]
    modules = [m for whole in made for m in whole.modules()]
    untried = [
        f"{name}.{option}"
        for name in _torch_layers.KINDS
        for option, default in _options(getattr(nn, name))
        if all(_is_default(m, option, default) for m in modules if type(m).__name__ == name)
    ]
    assert not untried


_ELSEWHERE = {"inplace", "device", "dtype"}  # of no consequence in JAX, or in a test of their own
_OLD = ("min_value", "max_value")  # Hardtanh's

_ONE_RANK = ("1d", "3d")  # where one rank tries an option, the same code serves the others


def _options(kind: type[nn.Module]) -> list[tuple[str, object]]:
    given = inspect.signature(kind).parameters.values()
    known = _ELSEWHERE | {"args", "kwargs"}
    skipped = "Pad" in kind.__name__ or kind.__name__.endswith(_ONE_RANK)
    return [(p.name, p.default) for p in given if p.name not in known and not skipped]


def _is_default(module: nn.Module, option: str, default: object) -> bool:
    """Whether a module shows an option as it is by default; what it shows elsewhere is named."""
    if default is inspect.Parameter.empty:
        return False
    kind = type(module).__name__
    given = kind.startswith("Transformer")  # all of them in CASES, or by the test of a decoder
    # The numbers themselves; of use with max_norm only; refused; PyTorch's past.
    given |= option in ("init", "norm_type", "_weight", "_freeze", "process_group", *_OLD)
    given |= option == "padding_mode" and "Transpose" in kind  # 'zeros' is the only one
    if given:
        return False
    shown = {"add_bias_kv": "bias_k", "affine": "weight", "elementwise_affine": "weight"}
    if option == "bias" and kind == "MultiheadAttention":
        return module.in_proj_bias is not None
    value = getattr(module, shown.get(option, option))
    if option in (*shown, "bias"):
        return (value is not None) == default
    sizes = value if isinstance(value, tuple) else (value,)
    return value == default or set(sizes) == {default}


ATTENTIONS = {
    "plain": nn.MultiheadAttention(4, 2, batch_first=True),
    "all": nn.MultiheadAttention(4, 2, 0.25, False, True, True, 3, 5, batch_first=True),
}


@pytest.mark.parametrize("module", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_has_every_option(module: nn.MultiheadAttention) -> None:
    module = copy.deepcopy(module).double().eval()
    twin = from_torch(module, None)
    assert type(twin) is attention.MultiHeadAttention
    assert twin.p == module.dropout
    inputs = [values(2, 3, n, seed=n, offset=0.0) / 5 for n in (4, module.kdim, module.vdim)]
    expected, _ = module(*map(torch.tensor, inputs))
    with jax.enable_x64(True):
        assert_same(twin(*map(jnp.asarray, inputs)), expected)


def test_a_decoder_layer_and_an_embedding_have_twins() -> None:
    module = nn.TransformerDecoderLayer(4, 2, 6, 0.0, "gelu", 1e-3, True, True).double()
    table = nn.Embedding(7, 3, padding_idx=-2).double()
    inputs = [values(2, 3, 4, seed=n) for n in range(2)]
    indices = np.array([[0, 5], [6, 1]])
    decoder, embed = from_torch(module, None), from_torch(table, None)
    assert embed.padding_idx == 5
    with jax.enable_x64(True):
        assert_same(decoder(*map(jnp.asarray, inputs)), module(*map(torch.tensor, inputs)))
        assert_same(embed(jnp.asarray(indices)), table(torch.tensor(indices)))


KINKS = {
    "CELU": nn.CELU(0.5), "ELU": nn.ELU(0.5), "LeakyReLU": nn.LeakyReLU(0.2), "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(), "Hardtanh": nn.Hardtanh(-3.0, 3.0), "Hardshrink": nn.Hardshrink(3.0),
    "Softshrink": nn.Softshrink(3.0), "Threshold": nn.Threshold(3.0, 1.0),
    "Hardsigmoid": nn.Hardsigmoid(), "Hardswish": nn.Hardswish(), "SELU": nn.SELU(),
    "Softplus": nn.Softplus(1.0, 3.0), "LogSigmoid": nn.LogSigmoid(),
}  # fmt: skip


def test_activations_have_pytorchs_slopes_at_their_kinks_and_keep_nan() -> None:
    points = np.array([-3.0, 0.0, 3.0, 6.0, -800.0, 800.0, np.nan])
    twins = nnx.List([from_torch(module) for module in KINKS.values()])
    with jax.enable_x64(True):
        x = jnp.asarray(points)
        outputs, pull = jax.vjp(lambda x: [twin(x) for twin in twins], x)
        basis = jnp.ones_like(x)
        for place, (name, module) in enumerate(KINKS.items()):
            t = torch.tensor(points, requires_grad=True)
            expected = module(t)
            (slope,) = torch.autograd.grad(expected.sum(), t)
            found = [basis if i == place else 0 * basis for i in range(len(KINKS))]
            assert_same(outputs[place], expected)
            if name == "Hardsigmoid":  # PyTorch's 1 / 6 is float32's (docs/upstream.md)
                assert 0 < abs(float(slope[1]) - 1 / 6) < np.finfo(np.float32).eps / 6
                slope = torch.tensor([0, 1 / 6, 0, 0, 0, 0, 0], dtype=torch.float64)
            assert_same(pull(found)[0][:-1], slope[:-1])  # at NaN a slope means nothing


def test_low_precision_is_rounded_at_the_end_as_in_pytorch() -> None:
    x = np.linspace(-4, 4, 1001)
    for name in ("GELU", "SiLU", "Softplus", "Sigmoid", "Mish"):
        module = getattr(nn, name)()
        theirs = module(torch.tensor(x, dtype=torch.bfloat16)).float().numpy()
        twin, low = interop.from_torch(module), jnp.asarray(x, jnp.bfloat16)
        ours = twin(low)
        assert ours.dtype == jnp.bfloat16
        options = dict(twin.function.options)
        rounded_often = _torch_functions._ELEMENTWISE[name](low, **options)
        off, often = (np.mean(np.asarray(a, np.float32) != theirs) for a in (ours, rounded_often))
        # float32's last digit decides a few: 1.4 % of GELU's, none of the others; else 17 to 42 %.
        assert 10 * off < often, name


def test_the_mode_is_carried_module_by_module() -> None:
    net = Net(nn.BatchNorm1d(4), nn.Dropout(0.5), Net(nn.BatchNorm1d(4), nn.Dropout(0.5)))
    net[0].eval()
    net[2][1].eval()
    first, drop, inner = interop.from_torch(net, rngs=nnx.Rngs(0)).layers[:3]
    assert first.use_running_average
    assert not drop.deterministic
    assert not inner.layers[0].use_running_average
    assert inner.layers[1].deterministic
    attended = nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True).eval()
    attended.dropout1.train()
    twin = interop.from_torch(attended, rngs=nnx.Rngs(0))
    assert twin.self_attn.deterministic
    assert twin.dropout.deterministic
    assert not twin.dropout1.deterministic
    drops = (twin.self_attn, twin.dropout, twin.dropout1, twin.dropout2)
    assert [drop.p for drop in drops] == [0.5] * 4


def test_a_frozen_norm_in_a_training_net_keeps_its_statistics() -> None:
    net = Net(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    net[0].eval()
    net[0].running_mean += 1
    twin = interop.from_torch(net)
    twin(jnp.asarray(values(8, 4), jnp.float32))
    frozen, moving = twin.layers
    np.testing.assert_array_equal(frozen.mean[...], 1)
    assert frozen.count[...] == 0
    assert moving.count[...] == 1
    assert np.all(np.asarray(moving.mean[...]) != 0)


def test_dtypes_are_carried_layer_by_layer() -> None:
    net = Net(nn.Linear(2, 3).bfloat16(), nn.BatchNorm1d(3), nn.Linear(3, 2).half())
    twin = interop.from_torch(net)
    kinds = [str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(twin, nnx.Param))]
    assert sorted(kinds) == ["bfloat16"] * 2 + ["float16"] * 2 + ["float32"] * 2
    x = jnp.ones((4, 2), jnp.bfloat16)
    assert twin.layers[0](x).dtype == jnp.bfloat16


def test_names_and_bits_come_back() -> None:
    net = CASES["convolutional"].make()
    net[1].running_mean += torch.randn(6)
    twin = interop.from_torch(net, layout="image")
    back, state = interop.state_dict(twin), net.state_dict()
    assert back.keys() == state.keys()
    assert all(back[n].tobytes() == t.numpy().tobytes() for n, t in state.items())
    assert type(twin) is nnx.Sequential
    assert type(twin.layers[0]) is linear.Conv
    assert type(twin.layers[1]) is norms.BatchNorm


def test_lists_and_dicts_become_nnxs() -> None:
    net = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(3, 4, 1)]), "b": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="'b' Linear: alone it wants layout=None"):
        interop.from_torch(net, layout="image")
    net["b"] = Net(nn.Flatten(), nn.Linear(4, 2))
    twin = interop.from_torch(net, layout="image")
    assert isinstance(twin, nnx.Dict)
    assert isinstance(twin["a"], nnx.List)
    assert interop.state_dict(twin).keys() == net.state_dict().keys()


def test_a_type_without_a_forward_of_its_own_is_its_base() -> None:
    assert type(interop.from_torch(Renamed(2, 3))) is linear.Linear


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused_by_its_name(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=f"cannot make a twin of .*{words}"):
        interop.from_torch(make(), rngs=None if name == "dropping" else nnx.Rngs(0))


def test_float64_is_not_rounded_silently() -> None:
    with pytest.raises(ValueError, match=r"JAX holds no float64 as it is set. Set jax_enable_x64"):
        interop.from_torch(nn.Linear(2, 2).double())


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"module must be a torch.nn.Module, got module='Linear'"):
        interop.from_torch(linear.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="layout must be 'image' or None, got layout='NHWC'"):
        interop.from_torch(nn.ReLU(), layout="NHWC")


class Doubling(nnx.Module):
    def __init__(self, layer: nnx.Module) -> None:
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * self.layer(x)


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop._torch_twin, "_TAUGHT", {})


@pytest.mark.usefixtures("taught")
def test_a_container_can_be_taught() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4, 1e-2, 0.4)

    class Ours(nnx.Module):
        def __init__(self) -> None:
            self.conv = linear.Conv(3, 4, 3, bias=False, rngs=nnx.Rngs(0))
            self.bn = norms.BatchNorm(4)
            self.norm = nnx.data(None)

    module = Net(Wrapped().eval())
    with pytest.raises(ValueError, match=r"'0' Wrapped: it has a forward of its own. Call flaxst"):
        interop.from_torch(module)
    interop.register_twin(Wrapped, lambda *_: Ours(), rename=lambda n: n.replace("norm", "bn"))
    twin = interop.from_torch(module).layers[0]
    # What both know by one name has PyTorch's settings; what was renamed is the builder's.
    assert twin.conv.stride == (2, 2)
    assert twin.bn.momentum == 0.1
    np.testing.assert_array_equal(
        np.moveaxis(np.asarray(twin.conv.kernel[...]), (2, 3), (1, 0)),
        module[0].conv.weight.detach().numpy(),
    )
    with pytest.raises(ValueError, match="a type is taught once, got torch_type='test_a"):
        interop.register_twin(Wrapped, lambda *_: Ours())


@pytest.mark.usefixtures("taught")
def test_a_taught_twin_must_take_every_weight_and_be_a_module() -> None:
    interop.register_twin(Doubled, lambda *_: Doubling(linear.Linear(2, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"twin of '1' Doubled: every tensor must fit the model"):
        interop.from_torch(Net(nn.ReLU(), Doubled(2, 2)))
    full = "parity_tests.support.torch_modules.Renamed"
    interop.register_twin(full, lambda *_: None)
    with pytest.raises(ValueError, match=r"build must return an nnx.Module"):
        interop.from_torch(Renamed(2, 2))
    with pytest.raises(ValueError, match="convert takes submodules"):
        interop.Converter(nn.ReLU())(nn.Tanh())


def test_twins_can_be_pickled_split_and_used_in_tree_mode() -> None:
    twin = from_torch(CASES["features in two places"].make().float())
    x = jnp.ones(CASES["features in two places"].shape, jnp.float32)
    expected = twin(x)
    graph, state = nnx.split(pickle.loads(pickle.dumps(twin)))  # noqa: S301
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), expected)
    assert hash(graph) == hash(nnx.graphdef(twin))


def test_torch_is_not_imported() -> None:
    code = "import sys, flaxstab.interop as i\ntry: i.from_torch(3)\nexcept ValueError: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603


@pytest.mark.parametrize(("kind", "stem"), [("basic", "imagenet"), ("bottleneck", "cifar")])
def test_a_resnet_becomes_flaxstabs(kind: str, stem: str) -> None:
    module = ResNet(kind, (1, 1), 5, stem, 4).double().eval()
    module.layer1[0].bn1.eps, module.layer2[0].bn2.momentum = 1e-2, 0.3
    module.bn1.train()
    module.conv1.stride = (3, 3)
    twin = from_torch(module)
    assert type(twin) is models.ResNet
    assert twin.layer1[0].bn1.eps == 1e-2
    assert twin.layer2[0].bn2.momentum == 0.3
    assert not twin.bn1.use_running_average
    back, state = interop.state_dict(twin), module.state_dict()
    assert all(back[n].tobytes() == t.numpy().tobytes() for n, t in state.items())
    twin.eval()
    module.eval()
    images = values(2, 16, 17, 3)
    with jax.enable_x64(True):
        expected = module(torch.tensor(images).movedim(-1, 1))
        assert_same(jax.jit(lambda x: 1 * twin(x), compiler_options=QUICKLY)(images), expected)


def test_a_resnet_with_other_parts_is_refused_by_their_name() -> None:
    module = ResNet("basic", (1,), 5, "cifar", 4)
    module.bn1 = nn.GroupNorm(2, 4)
    with pytest.raises(ValueError, match=r"plain blocks, got parts=\['GroupNorm'\]"):
        interop.from_torch(module)
    with pytest.raises(ValueError, match=r"plain blocks, got parts=.*'PreActResBlock'"):
        interop.from_torch(ResNet("preact", (1,), 5, "cifar", 4))
    module = ResNet("basic", (1,), 5, "imagenet", 4)
    module.maxpool = nn.MaxPool2d(2)
    with pytest.raises(ValueError, match="stem pools 3x3 by 2"):
        interop.from_torch(module)
