"""``compare`` names the side at fault: by a witness, by the outputs' slope, by dtype."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flaxstab import functional, linear, norms, parity
from flaxstab.parity import Verdict
from parity_tests.support.cases import values
from parity_tests.support.pairs import Net, TorchNet, failures, finding, torch_linear

X = values(8, 4)
Y = values(8, 4, seed=1)
IMAGES = values(2, 5, 5, 3)
IDS = np.array([[0, 2], [3, 3]])


def blamed(report: parity.Report) -> dict[str, str]:
    """Returns the side of every float64 quantity that does not pass."""
    return {f.name: f.side for f in report.findings if not f.passed and f.dtype == "float64"}


def formula(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


OUTPUTS = [
    (jax.nn.gelu, F.gelu, "jax"),
    (functional.gelu, lambda x: F.gelu(x, approximate="tanh"), "torch"),
    (jax.nn.gelu, lambda x: 1.01 * F.gelu(x), ""),
]


@pytest.mark.parametrize(("ours", "theirs", "side"), OUTPUTS, ids=["jax", "torch", "both"])
def test_the_witness_names_the_side_with_wrong_outputs(
    ours: Callable[[jax.Array], jax.Array], theirs: Callable[[Tensor], Tensor], side: str
) -> None:
    report = parity.compare(ours, theirs, X, dtypes=(), witness=formula)
    assert blamed(report) == dict.fromkeys(("output", "evaluation", "grad input 0"), side)
    assert report.side == side
    assert (f"({side} is at fault)" in str(report).splitlines()[0]) is bool(side)
    without = parity.compare(ours, theirs, X, dtypes=())
    assert not without.passed
    assert blamed(without)["output"] == ""


BUFFERS = [(0.9, 0.1, "jax"), (0.1, 0.9, "torch"), (0.8, 0.9, "")]


@pytest.mark.parametrize(("ours", "theirs", "side"), BUFFERS, ids=["jax", "torch", "both"])
def test_the_witness_names_the_side_with_wrong_buffers(
    ours: float, theirs: float, side: str
) -> None:
    report = parity.compare(
        norms.BatchNorm(4, momentum=ours), torch.nn.BatchNorm1d(4, momentum=theirs), X,
        dtypes=(), witness=torch.nn.BatchNorm1d(4),
    )  # fmt: skip
    found = blamed(report)
    assert {"step 1 running_mean", "step 10 running_var", "evaluation"} <= found.keys()
    assert set(found.values()) == {side}


def test_the_witness_gets_the_weights_and_statistics_of_the_pair() -> None:
    theirs, witness = torch_linear(0), torch_linear(1)
    report = parity.compare(
        nnx.Linear(4, 4, use_bias=True, rngs=nnx.Rngs(0), dtype=jnp.float32), theirs, X,
        dtypes=(), witness=witness,
    )  # fmt: skip
    assert blamed(report)["output"] == "jax"  # it pins float32
    assert not torch.equal(theirs.weight, witness.weight)  # the witness itself is not changed


class Gradients(nnx.Module):
    """LayerNorm that takes one of its variables for a constant."""

    def __init__(self, constant: str = "") -> None:
        self.norm, self.constant = norms.LayerNorm(4), constant

    def __call__(self, x: jax.Array) -> jax.Array:
        given = {"input": x, "weight": self.norm.scale[...], "bias": self.norm.bias[...]}
        if self.constant:
            given[self.constant] = jax.lax.stop_gradient(given[self.constant])
        return functional.layer_norm(given["input"], (4,), given["weight"], given["bias"])


class TorchGradients(torch.nn.Module):
    """Its twin."""

    def __init__(self, constant: str = "") -> None:
        super().__init__()
        self.norm, self.constant = torch.nn.LayerNorm(4), constant

    def forward(self, x: Tensor) -> Tensor:
        given = {"input": x, "weight": self.norm.weight, "bias": self.norm.bias}
        if self.constant:
            given[self.constant] = given[self.constant].detach()
        return F.layer_norm(given["input"], (4,), given["weight"], given["bias"])


PLACES = {"input": "grad input 0", "weight": "grad norm.weight", "bias": "grad norm.bias"}


@pytest.mark.parametrize("constant", PLACES)
@pytest.mark.parametrize("side", ["jax", "torch"])
@pytest.mark.parametrize("witness", [None, TorchGradients()], ids=["slope", "witness"])
def test_a_wrong_gradient_names_its_side_with_and_without_a_witness(
    constant: str, side: str, witness: TorchGradients | None
) -> None:
    ours = Gradients(constant if side == "jax" else "")
    theirs = TorchGradients(constant if side == "torch" else "")
    report = parity.compare(ours, theirs, X, dtypes=(), witness=witness)
    assert blamed(report) == {PLACES[constant]: side}
    assert report.side == side


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_the_slope_names_the_side_in_the_layout_of_images(side: str) -> None:
    def ours(x: jax.Array) -> jax.Array:
        return 2 * x - (jax.lax.stop_gradient(x) if side == "jax" else x)

    def theirs(x: Tensor) -> Tensor:
        return 2 * x - (x.detach() if side == "torch" else x)

    report = parity.compare(ours, theirs, IMAGES, layout="image", dtypes=())
    assert blamed(report) == {"grad input 0": side}


def test_the_slope_moves_the_input_whose_gradient_is_wrong() -> None:
    """Integers before it do not count."""

    def ours(i: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return x[i] * jax.lax.stop_gradient(y)[i]

    report = parity.compare(ours, lambda i, x, y: x[i] * y[i], IDS, X, Y, dtypes=())
    assert blamed(report) == {"grad input 1": "jax"}


class Dropping(TorchNet):
    """Gives the head's bias twice its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.head.bias
        return super().forward(x) + (bias - bias.detach())


def test_the_slope_replays_dropout() -> None:
    report = parity.compare(Net(), Dropping(), X, dtypes=())
    assert blamed(report) == {"grad head.bias": "torch"}


def straight_through(factor: float) -> Callable[[jax.Array], jax.Array]:
    """Rounds; its gradient is as if it were a multiplication."""

    @jax.custom_vjp
    def rounded(x: jax.Array) -> jax.Array:
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (factor * g,))
    return rounded


def torch_straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def test_a_gradient_that_is_the_slope_on_neither_side_names_nobody() -> None:
    assert parity.compare(straight_through(1.0), torch_straight_through, X).passed
    report = parity.compare(straight_through(2.0), torch_straight_through, X, dtypes=())
    assert blamed(report) == {"grad input 0": ""}
    honest = parity.compare(jnp.round, torch_straight_through, X, dtypes=())
    assert blamed(honest) == {"grad input 0": "torch"}  # its rounding has no slope


def test_a_witness_of_another_gradient_names_nobody() -> None:
    def third(x: Tensor) -> Tensor:
        return 3 * x + (torch.round(x) - 3 * x).detach()

    report = parity.compare(
        straight_through(2.0), torch_straight_through, X, dtypes=(), witness=third
    )
    assert blamed(report) == {"grad input 0": ""}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [
        (lambda x: 2 * x.astype("float32"), lambda x: 2 * x, "jax"),
        (lambda x: 2 * x, lambda x: 2 * x.float(), "torch"),
    ],
    ids=["jax", "torch"],
)
def test_a_promoted_dtype_names_the_side_that_promotes(
    dtype: object, ours: Callable[..., object], theirs: Callable[..., object], side: str
) -> None:
    def in_half(x: jax.Array | Tensor, function: Callable[..., object]) -> object:
        return function(x) if x.dtype in (dtype, torch.bfloat16, torch.float16) else 2 * x

    report = parity.compare(
        lambda x: in_half(x, ours), lambda x: in_half(x, theirs), X, dtypes=(np.float32, dtype)
    )
    label = np.dtype(dtype).name
    assert failures(report, label) == {"output", "evaluation"}
    found = finding(report, "output", label)
    assert (found.verdict, found.side) == (Verdict.SEMANTICS_DIFFER, side)
    assert found.explanation.startswith("the dtypes differ: ")
    assert not failures(report, "float32") | failures(report)


class Pinned(nnx.Module):
    """A linear layer that computes in float32, whatever it is given."""

    def __init__(self) -> None:
        self.lin = nnx.Linear(4, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin(x).astype(x.dtype)


class TorchPinned(torch.nn.Module):
    def __init__(self, *, pinned: bool) -> None:
        super().__init__()
        self.lin, self.pinned = torch_linear(), pinned

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.float32 if self.pinned else x.dtype
        return F.linear(x.to(kind), self.lin.weight.to(kind), self.lin.bias.to(kind)).to(x.dtype)


class Free(nnx.Module):
    def __init__(self) -> None:
        self.lin = linear.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin(x)


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_layer_that_pins_float32_is_named_by_the_witness(side: str) -> None:
    ours, theirs = Pinned() if side == "jax" else Free(), TorchPinned(pinned=side == "torch")
    report = parity.compare(ours, theirs, X, witness=TorchPinned(pinned=False))
    assert blamed(report)["output"] == side
    assert not failures(report, "float32")  # there both compute alike
