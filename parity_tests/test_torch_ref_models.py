"""``torch_ref.models``: structure, initialisation and what the documents observe with them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parity_tests.support.torch_checks import SLACK, assert_close, draw, norm_magnitude
from torch_ref import models
from torch_ref.functional import layer_norm

NETS = [models.NetInConstructor, models.NetByApply, models.NetByModules]
NAMES = ["layer.0.weight", "layer.0.bias", "fc.weight", "fc.bias"]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _replay(model: nn.Module, fill: Callable[[Tensor], Tensor], make: Callable[[], object]) -> None:
    """Seed, draw what the constructors draw, then fill copies: the weights of ``model``."""
    torch.manual_seed(0)
    make()
    for name, theta in model.named_parameters():
        if theta.ndim > 1:
            assert torch.equal(theta, fill(torch.empty(theta.shape))), name
        elif "norm" not in name:
            assert torch.equal(theta, torch.zeros_like(theta)), name


@pytest.mark.parametrize("net", NETS)
def test_net_has_xavier_weights_and_bias_0_01(net: type[nn.Module]) -> None:
    model = _seeded(net)
    torch.manual_seed(0)
    nn.Linear(1, 2), nn.Linear(2, 1)
    expected = [nn.init.xavier_uniform_(torch.empty(shape)) for shape in ((2, 1), (1, 2))]
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert torch.equal(model.layer[0].weight, expected[0])
    assert torch.equal(model.fc.weight, expected[1])
    assert torch.equal(model.layer[0].bias, torch.full((2,), 0.01))
    assert torch.equal(model.fc.bias, torch.full((1,), 0.01))


def test_the_three_forms_of_net_are_the_same_network() -> None:
    x = draw(5, 1, seed=1, dtype="float32")
    outputs = [_seeded(net)(x) for net in NETS]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("net", NETS)
def test_net_is_linear_sigmoid_linear(net: type[nn.Module]) -> None:
    model, x = net().double(), draw(5, 1, seed=1)
    first, last = model.layer[0], model.fc
    h = 1 / (1 + torch.exp(-(x @ first.weight.T + first.bias)))
    expected = h @ last.weight.T + last.bias
    assert_close(model(x).detach(), expected.detach(), x.abs().max())


def test_apply_visits_children_first_and_returns_the_module_and_modules_parents_first() -> None:
    model, seen = models.NetByApply(), []
    assert model.apply(lambda module: seen.append(type(module))) is model
    assert seen == [nn.Linear, nn.Sigmoid, nn.Sequential, nn.Linear, models.NetByApply]
    assert [type(module) for module in model.modules()] == [
        *(models.NetByApply, nn.Sequential),
        *(nn.Linear, nn.Sigmoid, nn.Linear),
    ]


@pytest.mark.parametrize(("act", "kind"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("elu", nn.ELU)])
def test_small_cnn_has_the_documents_layers_and_kaiming_weights(
    act: str, kind: type[nn.Module]
) -> None:
    model = _seeded(lambda: models.SmallCNN(act))
    assert [type(layer) for layer in model.net] == [
        *(nn.Conv2d, kind, nn.Conv2d, kind),
        *(nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear),
    ]
    assert model.net[1] is model.net[3] is model.act
    _replay(
        model,
        lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
        lambda: (nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10)),
    )
    assert model(draw(2, 3, 6, 5, seed=1, dtype="float32")).shape == (2, 10)


def test_small_cnn_is_relu_by_default_and_names_an_unknown_activation() -> None:
    assert isinstance(models.SmallCNN().act, nn.ReLU)
    assert models.SmallCNN("gelu").act.approximate == "none"
    with pytest.raises(ValueError, match="one of relu, gelu, elu, got 'tanh'; choose"):
        models.SmallCNN("tanh")


@pytest.mark.parametrize("name", ["xavier", "kaiming"])
def test_toy_deep_is_ten_linear_and_relu_with_normal_weights(name: str) -> None:
    model = _seeded(lambda: models.ToyDeep(name))
    assert [type(layer) for layer in model.net] == [nn.Linear, nn.ReLU] * 10
    _replay(
        model,
        nn.init.xavier_normal_
        if name == "xavier"
        else lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
        lambda: [nn.Linear(512, 512) for _ in range(10)],
    )


def test_toy_deep_is_xavier_by_default_and_refuses_other_names() -> None:
    default, xavier = _seeded(models.ToyDeep), _seeded(lambda: models.ToyDeep("xavier"))
    x = draw(2, 512, seed=1, dtype="float32")
    assert torch.equal(default(x), xavier(x))
    assert default(x).std().item() != models.ToyDeep("kaiming")(x).std().item()
    with pytest.raises(ValueError, match="'xavier' or 'kaiming', got 'he'; choose"):
        models.ToyDeep("he")


def test_xavier_loses_sqrt_2_per_relu_layer_and_kaiming_keeps_the_spread() -> None:
    x = draw(256, 512, seed=1, offset=0.0, scale=1.0, dtype="float32")
    xavier, kaiming = (
        torch.tensor(models.activation_stds(_seeded(lambda n=name: models.ToyDeep(n)), x))
        for name in ("xavier", "kaiming")
    )
    lost = 2.0 ** (-torch.arange(1, 11) / 2)  # same draws, so the ratio is exact
    assert_close(xavier / kaiming, lost)
    assert 0.5 < kaiming[-1] / kaiming[0] < 2
    assert xavier[-1] < xavier[0] / 16


def test_cnn_bn_and_cnn_ln_have_the_documents_names() -> None:
    assert list(models.CNN_BN().state_dict()) == [
        "net.0.weight",
        *(f"net.1.{name}" for name in nn.BatchNorm2d(1).state_dict()),
        "net.3.weight",
        *(f"net.4.{name}" for name in nn.BatchNorm2d(1).state_dict()),
    ]
    assert list(models.CNN_LN().state_dict()) == [
        f"{layer}.{name}"
        for layer in ("conv1", "conv2", "ln1", "ln2")
        for name in ("weight", "bias")
    ]


@pytest.mark.parametrize("make", [models.CNN_BN, models.CNN_LN])
def test_in_a_small_batch_only_batch_norm_mixes_the_samples(make: type[nn.Module]) -> None:
    model, x = _seeded(make).double(), draw(4, 3, 6, 5, seed=1)
    changed = torch.cat([x[:1], 3 * draw(3, 3, 6, 5, seed=2)])
    y, other = (model(value)[0].detach() for value in (x, changed))
    assert y.shape == (64, 6, 5)
    moved = (y - other).abs().max() > SLACK * torch.finfo(y.dtype).eps * x.abs().max()
    assert moved == (make is models.CNN_BN)


def test_the_norm_of_cnn_ln_is_over_channels_and_space() -> None:
    model, x = models.CNN_LN().double(), draw(4, 3, 6, 5, seed=1)
    convolved = model.conv1(x).detach()
    expected = layer_norm(convolved, (64, 6, 5))
    size = norm_magnitude(convolved, convolved.flatten(1).var(1))
    assert_close(model.ln1(convolved).detach(), expected, size)
    over_channels = (convolved - convolved.mean(1, keepdim=True)) / convolved.std(1, keepdim=True)
    assert (over_channels - expected).abs().max() > 0.1
    nn.init.constant_(model.ln2.bias, 0.5)
    first = model.act(model.ln1(model.conv1(x)))
    assert torch.equal(model(x), model.act(model.ln2(model.conv2(first))))


def test_cnn_bn_is_in_post_activation_order_without_biases() -> None:
    kinds = [type(layer) for layer in models.CNN_BN().net]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    assert models.CNN_BN().net[0].bias is None
    assert models.CNN_BN().net[3].bias is None


def _small(norm: str = "batch", act: str = "relu", drop: float = 0.1) -> models.StableCNN:
    return models.StableCNN(norm, act, widths=(4, 8), groups=2, image_size=8, drop=drop)


@pytest.mark.parametrize(
    ("norm", "kind", "groups"),
    [("batch", nn.BatchNorm2d, None), ("group", nn.GroupNorm, 2), ("layer", nn.GroupNorm, 1)],
)
def test_stable_cnn_takes_the_three_norms(
    norm: str, kind: type[nn.Module], groups: int | None
) -> None:
    model = _small(norm)
    assert [type(block.norm) for block in model.blocks] == [kind, kind]
    if groups is not None:
        assert [block.norm.num_groups for block in model.blocks] == [groups, groups]
    assert model(draw(3, 3, 8, 8, seed=1, dtype="float32")).shape == (3, 10)


def test_stable_cnn_defaults_are_batch_norm_relu_dropout_0_1_on_32_pixels() -> None:
    model = models.StableCNN()
    assert [tuple(block.conv.weight.shape) for block in model.blocks] == [
        (32, 3, 3, 3),
        (64, 32, 3, 3),
        (128, 64, 3, 3),
    ]
    assert model.head.weight.shape == (10, 128 * 4 * 4)
    for block in model.blocks:
        assert (type(block.norm), type(block.act)) == (nn.BatchNorm2d, nn.ReLU)
        assert block.drop.p == 0.1
    assert models.StableCNN("group").blocks[0].norm.num_groups == 16


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_stable_cnn_has_kaiming_weights_and_zero_biases(act: str) -> None:
    model = _seeded(lambda: _small("group", act))
    _replay(
        model,
        lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
        lambda: (
            nn.Conv2d(3, 4, 3, bias=False),
            nn.Conv2d(4, 8, 3, bias=False),
            nn.Linear(32, 10),
        ),
    )
    assert all(block.conv.bias is None for block in model.blocks)


def test_stable_cnn_runs_conv_norm_act_pool_drop_and_flattens_channels_first() -> None:
    model = _small(act="gelu", drop=0.5).double()
    x = draw(3, 3, 8, 8, seed=1)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    for block in model.blocks:
        x = block.drop(block.pool(block.act(block.norm(block.conv(x)))))
    expected = torch.einsum("nchw,kchw->nk", x, model.head.weight.reshape(10, 8, 2, 2))
    size = 32 * x.detach().abs().max()
    assert_close(y.detach(), (expected + model.head.bias).detach(), size)


def test_stable_cnn_drops_in_training_only() -> None:
    model = _small(drop=0.5)
    x = draw(3, 3, 8, 8, seed=1, dtype="float32")
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "instance"}, "'batch', 'group' or 'layer', got 'instance'; choose"),
        ({"act": "tanh"}, "relu, gelu, elu, got 'tanh'; choose"),
        ({"image_size": 7}, "got image_size=7 and 3 widths; use"),
        ({"norm": "group", "groups": 5}, "divisible"),
    ],
)
def test_stable_cnn_names_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.StableCNN(**arguments)
