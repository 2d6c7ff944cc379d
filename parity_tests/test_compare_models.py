"""``compare`` of models and functions: weights, names, structures, precisions and NaN."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flaxstab import linear, norms, parity
from flaxstab.parity import Verdict
from parity_tests.support.cases import values
from parity_tests.support.pairs import (
    Net,
    TorchNet,
    arrays_of,
    failures,
    finding,
    refusal,
    set_weights,
    torch_linear,
)

X = values(8, 4)
IDS = np.array([[0, 2], [3, 3]])


class Capped(nnx.Module):
    """Equal to a linear layer only as long as its weights are small."""

    def __init__(self, value: float) -> None:
        self.lin = linear.Linear(4, 4, rngs=nnx.Rngs(0))
        self.lin.kernel[...] = jnp.full((4, 4), value)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.minimum(self.lin(x), 5.0)


def twin(value: float) -> torch.nn.Module:
    return set_weights(torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4)}), value)


class Uncapped(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.lin = set_weights(torch.nn.Linear(4, 4), value)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.mark.parametrize(
    ("weights", "ours", "theirs", "passes"),
    [
        ("torch", 9.0, 0.01, True),
        ("torch", 0.01, 9.0, False),
        ("flax", 0.01, 9.0, True),
        ("flax", 9.0, 0.01, False),
    ],
)
def test_both_sides_get_the_weights_of_the_side_that_is_named(
    weights: str, ours: float, theirs: float, passes: bool
) -> None:
    report = parity.compare(Capped(ours), Uncapped(theirs), X, weights=weights, dtypes=())
    assert report.passed is passes, str(report)


def test_without_weights_each_side_keeps_its_own() -> None:
    ours, theirs = linear.Linear(4, 2, rngs=nnx.Rngs(0)), torch_linear(width=2)
    report = parity.compare(ours, theirs, X, weights=None, dtypes=())
    assert {"output", "evaluation"} <= failures(report)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(ours.kernel[...]).T))
        theirs.bias.copy_(torch.tensor(np.asarray(ours.bias[...])))
    assert parity.compare(ours, theirs, X, weights=None, dtypes=()).passed


@pytest.mark.parametrize(("weights", "passes"), [("torch", True), ("flax", True), (None, False)])
def test_statistics_are_carried_with_the_weights(weights: str | None, passes: bool) -> None:
    theirs = torch.nn.BatchNorm1d(4)
    theirs.running_var.fill_(7.0)
    report = parity.compare(norms.BatchNorm(4), theirs, X, weights=weights, dtypes=())
    assert report.passed is passes, str(report)
    if not passes:
        failed = failures(report)
        assert {*(f"step {n} running_var" for n in (1, 2, 10)), "evaluation"} <= failed
        assert not any("running_mean" in name or "grad" in name for name in failed)


class Renamed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn = torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8)
        self.out = torch.nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.bn(self.fc(x))))


def flax_name(name: str) -> str:
    return name.replace("fc.", "stem.").replace("bn.", "norm.").replace("out.", "head.")


@pytest.mark.parametrize("weights", ["torch", "flax"])
def test_rename_matches_other_names_and_the_report_uses_flaxs(weights: str) -> None:
    report = parity.compare(
        Net(0.0), Renamed(), X, rename=flax_name, weights=weights, dtypes=(), witness=Renamed()
    )
    assert report.passed, str(report)
    names = {f.name for f in report.findings}
    assert {"grad stem.weight", "grad head.bias", "step 2 norm.running_var"} <= names
    assert not any("fc." in name or "bn." in name for name in names)
    message = refusal(lambda: parity.compare(Net(0.0), Renamed(), X, weights=weights))
    assert "rename=" in message


Outputs = Callable[[jax.Array | Tensor], object]


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (lambda x: (x, 2 * x), lambda x: (x, 2.1 * x), ["output[0]", "output[1]"]),
        (lambda x: [x, (x, -x)], lambda x: [x, (x, x)], ["output[0]", "output[1][1]"]),
        (
            lambda x: {"a": x, "b": x + 1},
            lambda x: {"a": x, "b": x - 1},
            ["output['a']", "output['b']"],
        ),
    ],
    ids=["tuple", "nested", "dict"],
)
def test_each_output_has_its_name(ours: Outputs, theirs: Outputs, names: list[str]) -> None:
    same, other = names
    sound = parity.compare(ours, ours, X)
    assert sound.passed, str(sound)
    failed = failures(parity.compare(ours, theirs, X, dtypes=()))
    assert other in failed
    assert other.replace("output", "evaluation") in failed
    assert same not in failed


def test_integer_outputs_must_be_equal_and_get_no_gradient() -> None:
    def best(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 2 * x, jnp.argmax(x, -1)

    def torch_best(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.argmax(-1)

    def torch_worst(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.argmin(-1)

    assert parity.compare(best, torch_best, X).passed
    failed = failures(parity.compare(best, torch_worst, X))
    assert failed == {"output[1]", "evaluation[1]"}


def test_a_model_may_return_integers_alone() -> None:
    report = parity.compare(lambda x: jnp.argmax(x, -1), lambda x: x.argmax(-1), X)
    assert report.passed
    assert failures(parity.compare(lambda x: jnp.argmax(x, -1), lambda x: x.argmin(-1), X))


def test_several_inputs_have_a_gradient_each() -> None:
    y = values(8, 4, seed=1)
    assert parity.compare(jnp.multiply, torch.mul, X, y).passed
    report = parity.compare(jnp.multiply, lambda x, y: x * y + y - y.detach(), X, y, dtypes=())
    assert failures(report) == {"grad input 1"}
    third = parity.compare(
        lambda i, x, y: x[i] * y[i], lambda i, x, y: x[i] * y[i] * 1.1, IDS, X, y, dtypes=()
    )
    assert failures(third) == {"output", "evaluation", "grad input 0", "grad input 1"}


class Doubled(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * x


class TorchTimes(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("weights", ["torch", "flax", None])
def test_a_model_without_parameters_is_compared(weights: str | None) -> None:
    report = parity.compare(Doubled(), TorchTimes(2), X, weights=weights)
    assert report.passed
    assert not any(f.name.startswith("grad w") for f in report.findings)
    failed = failures(parity.compare(Doubled(), TorchTimes(3), X, weights=weights))
    assert failed == {
        "output", "step 2 output", "step 10 output", "evaluation", "grad input 0"
    }  # fmt: skip


@pytest.mark.parametrize("weights", ["torch", "flax", None])
def test_neither_side_is_changed(weights: str | None) -> None:
    ours, theirs = Net(), TorchNet().eval()
    ours.norm.var[...] = jnp.full(8, 3.0)
    before = arrays_of(ours)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    parity.compare(ours, theirs, X, weights=weights, dtypes=(np.float32,))
    for old, new in zip(before, arrays_of(ours), strict=True):
        np.testing.assert_array_equal(old, new)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.dtype == tensors[name].dtype
    assert not any(module.training for module in theirs.modules())
    assert ours.norm.use_running_average is False
    assert all(p.grad is None for p in theirs.parameters())
    assert not theirs.drop._forward_hooks


def test_arrays_of_sees_a_moved_stream() -> None:
    ours = Net()
    before = arrays_of(ours)
    ours.drop(jnp.ones((3, 3)))
    assert any((a != b).any() for a, b in zip(before, arrays_of(ours), strict=True))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_sound_layers_agree_in_half_precision(dtype: object) -> None:
    label = np.dtype(dtype).name
    report = parity.compare(Net(0.0), TorchNet(0.0), X, dtypes=(dtype,))
    assert report.passed, str(report)
    assert finding(report, "output", label).verdict in (Verdict.AGREE, Verdict.ILL_CONDITIONED)


def narrow(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda s, e: (s + e, None), jnp.zeros_like(x[:, 0]), x.T)[0]


def torch_narrow(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for column in x.T:
        total = total + column
    return total


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [
        (narrow, lambda x: x.sum(-1), "jax"),
        (lambda x: jnp.sum(x, -1), torch_narrow, "torch"),
        (narrow, torch_narrow, ""),
    ],
    ids=["jax", "torch", "both"],
)
def test_a_sum_kept_in_half_precision_is_found_on_its_side(
    dtype: object, ours: Outputs, theirs: Outputs, side: str
) -> None:
    x = np.abs(values(2, 512))
    report = parity.compare(ours, theirs, x, dtypes=(dtype,))
    assert finding(report, "output", np.dtype(dtype).name).side == side
    assert report.passed is (side != "jax")
    assert not failures(report), "float64 sees no difference"


def softplus(x: jax.Array) -> jax.Array:
    return jnp.log1p(jnp.exp(x))


def torch_softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (jnp.log, lambda x: torch.log(x.abs()), "NaN in different places: 1 and 0"),
        (jnp.abs, torch.log, "NaN in different places: 0 and 1"),
        (lambda x: 1 / (x - 1), lambda x: 1 / (x - 2), "infinities in different places"),
        (lambda x: 1 / (x - 1), lambda x: -1 / (1 - x), "infinities in different places"),
    ],
    ids=["nan in jax", "nan in torch", "infinity", "sign of infinity"],
)
def test_nan_and_infinity_in_other_places_are_found_in_float64(
    ours: Outputs, theirs: Outputs, words: str
) -> None:
    x = np.array([[-1.0, 1.0, 2.0, 3.0]])
    report = parity.compare(ours, theirs, x, dtypes=())
    found = finding(report, "output")
    assert found.verdict == Verdict.SEMANTICS_DIFFER
    assert words in found.explanation
    assert parity.compare(jnp.log, torch.log, x).passed  # NaN in the same place


def test_an_overflow_at_low_precision_only_is_its_sides() -> None:
    x = np.array([[1.0, 95.0, 50.0]])
    ours = parity.compare(softplus, F.softplus, x)
    assert finding(ours, "output").passed
    found = finding(ours, "output", "float32")
    assert (found.verdict, found.side) == (Verdict.JAX_WORSE, "jax")
    assert "infinities in different places" in found.explanation
    theirs = parity.compare(jax.nn.softplus, torch_softplus, x)
    assert theirs.passed
    assert finding(theirs, "output", "float32").verdict == Verdict.TORCH_WORSE
    both = parity.compare(softplus, torch_softplus, x)
    assert finding(both, "output", "float32").verdict == Verdict.AGREE


def scanned(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x, length=2)[0]


PROGRAMS = {
    "jit": jax.jit(lambda x: jnp.tanh(jnp.tanh(x))),
    "remat": jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x))),
    "vmap": jax.vmap(lambda x: jnp.tanh(jnp.tanh(x))),
    "scan": scanned,
    "cond": lambda x: jax.lax.cond(x.sum() > 0, scanned, jnp.sin, x),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_inside_the_program_are_compared(program: Outputs) -> None:
    report = parity.compare(program, lambda x: torch.tanh(torch.tanh(x)), X)
    assert report.passed, str(report)
    wrong = parity.compare(program, lambda x: torch.tanh(torch.tanh(x * (1 + 1e-9))), X, dtypes=())
    assert {"output", "grad input 0"} <= failures(wrong)


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.first = linear.Linear(4, 4, rngs=nnx.Rngs(0))
        self.second = self.first

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


class TorchTied(torch.nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.first = torch_linear()
        self.second = self.first if tied else torch_linear(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_tied_weights_have_one_gradient() -> None:
    report = parity.compare(Tied(), TorchTied(), X, dtypes=())
    assert report.passed, str(report)
    assert {f.name for f in report.findings if f.name.startswith("grad f")} == {
        "grad first.weight",
        "grad first.bias",
    }
    assert "second.weight" in refusal(lambda: parity.compare(Tied(), TorchTied(tied=False), X))
