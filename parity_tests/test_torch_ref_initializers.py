"""``torch_ref.initializers`` against ``torch.nn.init``, bit for bit, and against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parity_tests.support.torch_checks import assert_close, draw
from torch_ref import initializers

DTYPES = (torch.float32, torch.float64)

# name, arguments, shape
FILLS: list[tuple[str, dict[str, object], tuple[int, ...]]] = [
    ("zeros_", {}, (3, 4)),
    ("ones_", {}, (3, 4)),
    ("eye_", {}, (3, 5)),
    ("eye_", {}, (5, 3)),
    ("dirac_", {}, (4, 3, 5)),
    ("dirac_", {}, (3, 5, 3, 4)),
    ("dirac_", {"groups": 3}, (6, 4, 2, 3, 5)),
    ("uniform_", {}, (7, 9)),
    ("uniform_", {"a": -2.5, "b": 0.5}, (7, 9)),
    ("normal_", {}, (7, 9)),
    ("normal_", {"mean": 3.0, "std": 0.2}, (7, 9)),
    ("trunc_normal_", {}, (40, 30)),
    ("trunc_normal_", {"std": 0.02, "a": -0.04, "b": 0.03}, (40, 30)),
    ("trunc_normal_", {"mean": 1.0, "std": 2.0, "a": 4.0, "b": 5.0}, (40, 30)),
    ("trunc_normal_", {"a": -0.38, "b": 0.38}, (40, 30)),  # holds 0.296 of the mass, the border
    ("trunc_normal_", {"a": -0.40, "b": 0.40}, (40, 30)),  # 0.311
    ("sparse_", {"sparsity": 0.3}, (7, 9)),
    ("sparse_", {"sparsity": 0.9, "std": 2.0}, (7, 9)),
    ("xavier_uniform_", {}, (7, 9)),
    ("xavier_uniform_", {"gain": 5 / 3}, (7, 5, 3, 2)),
    ("xavier_normal_", {}, (7, 9)),
    ("xavier_normal_", {"gain": 0.1}, (7, 5, 3, 2)),
    ("kaiming_uniform_", {}, (7, 9)),
    ("kaiming_uniform_", {"a": math.sqrt(5)}, (7, 5, 3)),
    ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "relu"}, (7, 5, 3, 2)),
    ("kaiming_normal_", {}, (7, 9)),
    ("kaiming_normal_", {"a": 0.2}, (7, 5, 3)),
    ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "tanh"}, (7, 5, 3, 2)),
    ("orthogonal_", {}, (5, 5)),
    ("orthogonal_", {"gain": 0.5}, (9, 4)),
    ("orthogonal_", {}, (4, 3, 3, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "arguments", "shape"), FILLS)
def test_every_fill_equals_torch_bit_for_bit_and_draws_as_much(
    name: str, arguments: dict[str, object], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    results, states = [], []
    for module in (initializers, nn.init):
        torch.manual_seed(7)
        weight = nn.Parameter(torch.full(shape, 8.0, dtype=dtype))
        assert getattr(module, name)(weight, **arguments) is weight
        results.append(weight.detach())
        states.append(torch.get_rng_state())
    assert torch.equal(*results)
    assert torch.equal(*states)


def test_constant_equals_torch() -> None:
    ours = initializers.constant_(torch.empty(3, 4), 0.01)
    assert torch.equal(ours, nn.init.constant_(torch.empty(3, 4), 0.01))


@pytest.mark.parametrize(
    "name",
    [
        *("linear", "sigmoid", "tanh", "relu", "selu", "leaky_relu"),
        *(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)),
    ],
)
def test_every_gain_equals_torch(name: str) -> None:
    assert initializers.calculate_gain(name) == nn.init.calculate_gain(name)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.0, math.sqrt(5)])
def test_the_leaky_gain_has_the_slope_in_it(slope: float) -> None:
    gain = initializers.calculate_gain("leaky_relu", slope)
    assert gain == math.sqrt(2 / (1 + slope**2)) == nn.init.calculate_gain("leaky_relu", slope)


def test_an_activation_without_a_gain_is_named() -> None:
    with pytest.raises(ValueError, match=r"known gain, got 'gelu'; use one of .*leaky_relu"):
        initializers.calculate_gain("gelu")


@pytest.mark.parametrize(
    ("shape", "fans"), [((7, 5), (5, 7)), ((7, 5, 3), (15, 21)), ((7, 5, 3, 2), (30, 42))]
)
def test_fans_are_channels_times_window(shape: tuple[int, ...], fans: tuple[int, int]) -> None:
    assert initializers.fan_in_and_fan_out(torch.empty(shape)) == fans


def test_the_fan_in_of_a_layer_is_what_one_output_adds_up() -> None:
    conv = nn.Conv2d(6, 4, (3, 2), groups=2)
    with torch.no_grad():
        sums = nn.functional.conv2d(torch.ones(1, 6, 3, 2), torch.ones_like(conv.weight), groups=2)
    assert initializers.fan_in_and_fan_out(conv.weight)[0] == sums[0, 0, 0, 0]


def test_kaiming_uniform_is_bounded_with_the_root_and_not_as_printed() -> None:
    # n = 20 * 12: all of them within the printed bound, half the right one, has probability 2**-240
    torch.manual_seed(0)
    weight = initializers.kaiming_uniform_(torch.empty(20, 12), nonlinearity="relu")
    right, printed = math.sqrt(2) * math.sqrt(3 / 12), math.sqrt(2) * 3 / 12
    assert printed < weight.abs().max() <= right


def test_both_kaiming_forms_have_variance_gain_squared_over_fan_in() -> None:
    # n = 200 * 100: the bound is 6 standard errors of a normal's variance, sqrt(2 / n)
    for fill in (initializers.kaiming_uniform_, initializers.kaiming_normal_):
        torch.manual_seed(0)
        weight = fill(torch.empty(200, 100, dtype=torch.float64), nonlinearity="relu")
        error = abs(weight.var().item() / (2 / 100) - 1)
        assert error < 6 * math.sqrt(2 / weight.numel())


def test_the_printed_0_01_of_sparse_is_the_standard_deviation() -> None:
    # n = 900: 6 standard errors of a standard deviation are 6 / sqrt(2 n); sqrt(0.01) is 10 x more
    torch.manual_seed(0)
    weight = initializers.sparse_(torch.empty(100, 10), sparsity=0.1)
    kept = weight[weight != 0]
    assert (weight == 0).sum(0).tolist() == [10] * 10
    assert abs(kept.std().item() / 0.01 - 1) < 6 / math.sqrt(2 * kept.numel())


def test_trunc_normal_bounds_are_absolute() -> None:
    # n = 10,000: without bounds in units of std some draw leaves 2 std for certain (1 - 10**-200)
    torch.manual_seed(0)
    loose = initializers.trunc_normal_(torch.empty(10_000), std=0.02)
    tight = initializers.trunc_normal_(torch.empty(10_000), std=0.02, a=-0.04, b=0.04)
    assert loose.abs().max() > 0.04 >= tight.abs().max()
    assert tight.std() < loose.std()


@pytest.mark.parametrize("bounds", [(-1.0, 2.0), (2.5, 4.0)], ids=["body", "tail"])
def test_trunc_normal_has_the_truncated_mean(bounds: tuple[float, float]) -> None:
    # n = 20,000; the bound is 6 standard errors with the whole width as the standard deviation
    a, b = bounds
    torch.manual_seed(0)
    sample = initializers.trunc_normal_(torch.empty(20_000, dtype=torch.float64), a=a, b=b)
    density = [math.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) for x in bounds]
    mass = 0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))
    mean = (density[0] - density[1]) / mass
    assert abs(sample.mean().item() - mean) < 6 * (b - a) / math.sqrt(sample.numel())
    assert a <= sample.min() <= sample.max() <= b


def test_the_identity_hands_features_through() -> None:
    x = draw(4, 5, seed=1)
    assert torch.equal(x @ initializers.eye_(torch.empty(5, 5, dtype=x.dtype)).T, x)


def test_the_dirac_delta_hands_channels_through() -> None:
    x = draw(2, 6, 5, 4, seed=1)
    weight = initializers.dirac_(torch.empty(6, 2, 3, 3, dtype=x.dtype), groups=3)
    assert torch.equal(nn.functional.conv2d(x, weight, padding=1, groups=3), x)


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9), (4, 3, 3, 2)])
def test_orthogonal_rows_or_columns_are_orthonormal(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = initializers.orthogonal_(torch.empty(shape, dtype=torch.float64), gain=2.0).flatten(1)
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    assert_close(short @ short.T, 4 * torch.eye(len(short), dtype=torch.float64), 4)


def _units_after_training(fill: Callable[[Tensor], Tensor]) -> Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    fill(net[0].weight)
    for fixed in (net[0].bias, net[2].weight):
        initializers.constant_(fixed, 0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        ((net(draw(8, 3, seed=1)) - draw(8, 1, seed=2)) ** 2).mean().backward()
        optimizer.step()
    return net[0].weight.detach()


def test_constant_weights_fail_to_break_the_symmetry() -> None:
    before = initializers.constant_(torch.empty(4, 3, dtype=torch.float64), 0.1)
    constant = _units_after_training(lambda weight: initializers.constant_(weight, 0.1))
    drawn = _units_after_training(initializers.xavier_uniform_)
    assert not torch.equal(constant, before)
    assert_close(constant, constant[:1].expand(4, 3), constant.abs().max())
    assert (drawn - drawn[:1]).abs()[1:].min() > 0


INIT_LAYER: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    *[(name, nn.init.xavier_uniform_) for name in ("tanh", "sigmoid", "linear")],
    *[
        (name, lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
        for name in ("relu", "gelu", "elu", "prelu", "swish")
    ],
    (
        "leaky_relu",
        lambda weight: nn.init.kaiming_normal_(weight, a=0.3, nonlinearity="leaky_relu"),
    ),
]


@pytest.mark.parametrize(("nonlin", "fill"), INIT_LAYER, ids=[name for name, _ in INIT_LAYER])
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: nn.Conv2d(5, 7, 3)])
def test_init_layer_chooses_the_scheme_of_the_activation(
    make: Callable[[], nn.Module], nonlin: str, fill: Callable[[Tensor], Tensor]
) -> None:
    layer, expected = make(), make()
    torch.manual_seed(3)
    initializers.init_layer(layer, nonlin=nonlin, leaky_slope=0.3)
    torch.manual_seed(3)
    assert torch.equal(layer.weight, fill(expected.weight))
    assert torch.equal(layer.bias, torch.zeros(7))


def test_init_layer_defaults_are_relu_and_slope_0_01() -> None:
    first, second = nn.Linear(5, 7), nn.Linear(5, 7, bias=False)
    torch.manual_seed(3)
    initializers.init_layer(first)
    torch.manual_seed(3)
    initializers.init_layer(second, "relu")
    assert torch.equal(first.weight, second.weight)
    torch.manual_seed(3)
    initializers.init_layer(first, "leaky_relu")
    torch.manual_seed(3)
    assert torch.equal(first.weight, nn.init.kaiming_normal_(second.weight, a=0.01))


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(4), lambda: nn.Conv1d(3, 4, 2)])
def test_init_layer_leaves_other_modules_alone(make: Callable[[], nn.Module]) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    initializers.init_layer(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initializers.eye_(torch.empty(2, 2, 2)), "matrix, got shape .*; use dirac_"),
        (lambda: initializers.dirac_(torch.empty(2, 2)), "3 to 5 axes, got shape .*; use eye_"),
        (lambda: initializers.dirac_(torch.empty(4, 2, 1), groups=3), "groups=3 and 4 channels"),
        (lambda: initializers.sparse_(torch.empty(2), 0.5), "matrix, got shape"),
        (lambda: initializers.orthogonal_(torch.empty(2)), "2 or more axes, got shape"),
        (lambda: initializers.xavier_normal_(torch.empty(2)), "2 or more axes, got shape"),
        (
            lambda: initializers.kaiming_normal_(torch.empty(2, 2), mode="fan_avg"),
            "'fan_in' or 'fan_out', got 'fan_avg'",
        ),
    ],
)
def test_bad_arguments_say_what_was_given(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
