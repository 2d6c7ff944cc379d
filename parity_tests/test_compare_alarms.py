"""What ``compare`` excuses, and what not: tolerances, cancellation, kinks, matmul precision."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flaxstab import functional, linear, norms, parity
from flaxstab.parity import Tolerance, Verdict
from flaxstab.parity._models import Pair
from parity_tests.support.cases import values
from parity_tests.support.pairs import (
    Net,
    TorchNet,
    failures,
    finding,
    refusal,
    torch_linear,
)

X = values(8, 4)


def off(x: jax.Array) -> jax.Array:
    return functional.gelu(x) * (1 + 1e-10)


def test_a_tolerance_widens_what_it_names_and_nothing_else() -> None:
    every = {"output", "evaluation", "grad input 0"}
    assert failures(parity.compare(off, F.gelu, X, dtypes=())) == every
    rows = [
        ("output", {"evaluation", "grad input 0"}),
        ("grad *", {"output", "evaluation"}),
        ("*", set()),
    ]
    for pattern, left in rows:
        wider = (Tolerance(pattern, 1e3, "the constant is rounded"),)
        report = parity.compare(off, F.gelu, X, dtypes=(), tolerances=wider)
        assert failures(report) == left
        line = f"tolerance: {pattern} x1000, because the constant is rounded"
        assert line in str(report)
    wider = (Tolerance("*", 10.0, "not enough"),)
    assert failures(parity.compare(off, F.gelu, X, dtypes=(), tolerances=wider)) == every


def detour(x: jax.Array) -> jax.Array:
    """Equal to x, through terms of 1e8; XLA would cancel them without the barrier."""
    return jax.lax.optimization_barrier(x + 1e8) - 1e8


def test_a_tolerance_widens_low_precision_too() -> None:
    allowed = (Tolerance("output", 1e8, "terms of 1e8 cancel"),)
    report = parity.compare(detour, torch.clone, X, tolerances=allowed)
    assert failures(report, "float32") == {"evaluation"}


def test_a_program_that_cancels_is_worse_and_means_the_same() -> None:
    report = parity.compare(detour, torch.clone, X)
    assert not failures(report)
    assert failures(report, "float32") == {"output", "evaluation"}
    assert (report.verdict, report.side) == (Verdict.JAX_WORSE, "jax")
    wide = finding(report, "output")
    assert wide.verdict == Verdict.ILL_CONDITIONED
    assert "cancel in JAX's program" in wide.explanation


def test_a_program_that_cancels_does_not_hide_what_float64_can_see() -> None:
    report = parity.compare(detour, lambda x: x * 1.001, X, dtypes=())
    assert failures(report) == {"output", "evaluation", "grad input 0"}


@pytest.mark.parametrize(
    ("tolerance", "message"),
    [
        (Tolerance("output", 1.0, "why"), "must widen the bound, got factor=1.0"),
        (Tolerance("output", 0.5, "why"), "must widen the bound, got factor=0.5"),
        (Tolerance("output", float("nan"), "why"), "must widen the bound, got factor=nan"),
        (Tolerance("output", 2.0, " "), "must give its reason"),
    ],
)
def test_a_tolerance_without_reason_or_effect_is_refused(
    tolerance: Tolerance, message: str
) -> None:
    assert message in refusal(lambda: parity.compare(off, F.gelu, X, tolerances=(tolerance,)))


def test_a_bias_before_batch_norm_is_ill_conditioned_and_no_fault() -> None:
    report = parity.compare(Net(0.0, bias=True), TorchNet(0.0, bias=True), X)
    assert report.passed, str(report)
    assert report.verdict == Verdict.AGREE
    found = finding(report, "grad stem.bias")
    assert found.verdict == Verdict.ILL_CONDITIONED
    assert "a bias before a normalisation has no gradient" in found.explanation
    assert finding(report, "grad head.bias").verdict == Verdict.AGREE


class BiasGradient(TorchNet):
    """Gives the bias before the normalisation a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.stem.bias.sum()
        return super().forward(x) + (bias - bias.detach())


def test_a_gradient_where_there_should_be_none_is_found() -> None:
    report = parity.compare(Net(0.0, bias=True), BiasGradient(0.0, bias=True), X, dtypes=())
    assert failures(report) == {"grad stem.bias"}


def test_batch_norm_on_two_samples_raises_no_false_alarm() -> None:
    torch.manual_seed(0)
    pair = Pair(norms.BatchNorm(4), torch.nn.BatchNorm1d(4), (values(2, 4),))
    wrong = Pair(norms.BatchNorm(4), torch.nn.BatchNorm1d(4, eps=1.1e-5), (values(2, 4),))
    for seed in range(20):
        x = values(2, 4, seed=seed)
        report = pair.judge((x,), seed=seed)
        assert report.passed, str(report)
        assert "jax" not in {f.side for f in report.findings}, str(report)
        assert "output" in failures(wrong.judge((x,), dtypes=(), seed=seed))


def close_to_kink(x: jax.Array) -> jax.Array:
    return jax.nn.relu(3 * (x - 0.1))


def torch_close_to_kink(x: Tensor) -> Tensor:
    return torch.relu(3 * (x.double() - 0.1)).to(x.dtype)


def shifted(x: jax.Array) -> jax.Array:
    """ReLU with its kink at another place, from float32 on only: a fault on every input."""
    return jax.nn.relu(3 * (x - jnp.asarray(0.1, x.dtype) - (x.dtype == jnp.float32) * 0.01))


# float32 rounds 0.1 + 1e-9 to what it takes for 0.1: 0 in float32, 4.5e-9 in float64.
BORDER = np.array([[0.1 + 1e-9, 0.5, -0.5, 0.11]])


def test_a_kink_at_a_rounding_border_is_no_fault() -> None:
    report = parity.compare(close_to_kink, torch_close_to_kink, BORDER)
    assert report.passed, str(report)
    found = finding(report, "grad input 0", "float32")
    assert (found.verdict, found.side) == (Verdict.ILL_CONDITIONED, "")
    assert "a value on a kink" in found.explanation
    assert not parity.compare(shifted, torch_close_to_kink, BORDER).passed


def test_a_kink_is_no_fault_of_torch_either() -> None:
    def exact(x: jax.Array) -> jax.Array:
        border = jnp.nextafter(jnp.asarray(0.1, x.dtype), jnp.asarray(0, x.dtype))
        return jnp.where(x > border, 3 * (x - 0.1), 0.0)

    report = parity.compare(exact, lambda x: torch.relu(3 * (x - 0.1)), BORDER)
    assert report.passed, str(report)
    assert report.side == ""


@pytest.fixture
def fast_matmul() -> Iterator[None]:
    """Matrix products as on an accelerator: of bfloat16 terms, summed in float32."""
    with jax.default_matmul_precision("BF16_BF16_F32"):
        yield


MATMUL = {"output", "evaluation", "grad input 0", "grad weight"}


@pytest.mark.usefixtures("fast_matmul")
def test_a_fast_matmul_is_explained_and_not_called_worse() -> None:
    """A CPU computes all matrix products exactly: what a GPU does is put in by hand."""

    def product(x: jax.Array) -> jax.Array:
        exact = jax.config.jax_default_matmul_precision == "highest"
        return (x if exact else x.astype(jnp.bfloat16).astype(x.dtype)) @ jnp.eye(4, dtype=x.dtype)

    report = parity.compare(product, torch.clone, X)
    assert report.passed, str(report)
    words = "agrees with jax.default_matmul_precision('highest')"
    assert {f.name for f in report.findings if words in f.explanation} >= {"output", "evaluation"}


@pytest.mark.usefixtures("fast_matmul")
def test_a_fast_matmul_hides_no_other_fault() -> None:
    report = parity.compare(detour, torch.clone, X)
    assert failures(report, "float32") == {"output", "evaluation"}
    assert not any("highest" in f.explanation for f in report.findings)


def test_without_a_fast_matmul_there_is_nothing_to_explain() -> None:
    report = parity.compare(linear.Linear(4, 4, rngs=nnx.Rngs(0)), torch_linear(), X)
    assert report.passed
    assert not any("highest" in f.explanation for f in report.findings)
