"""``flaxstab.parity.compare`` finds planted faults on either side, and only those."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flaxstab import dropout, functional, linear, norms, parity
from flaxstab.parity import Verdict
from flaxstab.parity._flax_side import FlaxSide
from flaxstab.parity._inputs import Inputs
from flaxstab.parity._precision import Precision
from flaxstab.parity._program import NNXProgram
from flaxstab.parity._torch_side import TorchSide
from parity_tests.support.cases import values
from parity_tests.support.pairs import BiasedBatchNorm

RNGS = nnx.Rngs(0)
X = values(8, 4)
IMAGES = values(4, 6, 6, 4)
FAR = values(6, 32, offset=1e3, scale=1.0)
HOLED = np.where(np.arange(32).reshape(8, 4) % 7 == 3, np.nan, X)


class Case(NamedTuple):
    """Two sides, and the quantity and verdict by which their difference shows."""

    ours: object
    theirs: object
    inputs: np.ndarray
    quantity: str = ""
    verdict: Verdict = Verdict.SEMANTICS_DIFFER
    layout: str | None = None


class TransposedLinear(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class EpsOutside(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        std = x.std(-1, correction=0, keepdim=True) + self.eps
        return (x - x.mean(-1, keepdim=True)) / std * self.weight + self.bias


class NoGammaGradient(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.detach(), self.bias, self.eps)


def two_pass(x: jax.Array) -> jax.Array:
    return functional.layer_norm(x, (x.shape[-1],))


def one_pass(x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(x * x, -1, keepdims=True) - mean * mean
    return (x - mean) / jnp.sqrt(var + 1e-5)


def torch_one_pass(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5)


def torch_two_pass(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],))


def kept(x: jax.Array | Tensor) -> np.ndarray:
    return np.arange(x.shape[-1]) % 3 > 0


def dropped(x: jax.Array) -> jax.Array:
    mask = jnp.broadcast_to(jnp.asarray(kept(x)), x.shape)
    return functional.dropout(x, 0.25, mask)


def torch_dropped(x: Tensor) -> Tensor:
    return x * (torch.tensor(kept(x)).to(x.dtype) / 0.75)


def batch_norm() -> norms.BatchNorm:
    return norms.BatchNorm(4)


def conv(**options: object) -> linear.Conv:
    return linear.Conv(4, 4, 3, rngs=RNGS, **options)


SOUND = {
    "batch norm": Case(batch_norm(), torch.nn.BatchNorm2d(4), IMAGES, layout="image"),
    "layer norm": Case(norms.LayerNorm(4), torch.nn.LayerNorm(4), X),
    "no parameters": Case(
        norms.LayerNorm(4, elementwise_affine=False),
        torch.nn.LayerNorm(4, elementwise_affine=False),
        X,
    ),
    "linear": Case(linear.Linear(4, 4, rngs=RNGS), torch.nn.Linear(4, 4), X),
    "conv": Case(conv(stride=2, padding=1), torch.nn.Conv2d(4, 4, 3, 2, 1), IMAGES, layout="image"),
    "gelu": Case(functional.gelu, F.gelu, X),
    "function and module": Case(functional.gelu, torch.nn.GELU(), X),
    "variance far from 0": Case(two_pass, torch_two_pass, FAR),
    "NaN in both": Case(dropped, torch_dropped, HOLED),
    "dropout": Case(dropped, torch_dropped, X),
}

FAULTS = {
    "flax: momentum": Case(
        norms.BatchNorm(4, momentum=0.9), torch.nn.BatchNorm2d(4), IMAGES,
        "step 1 running_mean", layout="image",
    ),
    "torch: momentum": Case(
        batch_norm(), torch.nn.BatchNorm2d(4, momentum=0.9), IMAGES,
        "step 1 running_var", layout="image",
    ),
    "torch: biased running variance": Case(
        batch_norm(), BiasedBatchNorm(4), IMAGES, "step 1 running_var", layout="image"
    ),
    "flax: eps 1e-6": Case(nnx.LayerNorm(4, rngs=RNGS), torch.nn.LayerNorm(4), X, "output"),
    "torch: eps 1e-6": Case(norms.LayerNorm(4), torch.nn.LayerNorm(4, 1e-6), X, "output"),
    "torch: eps outside the root": Case(norms.LayerNorm(4), EpsOutside(4), X, "output"),
    "torch: transposed square kernel": Case(
        linear.Linear(4, 4, rngs=RNGS), TransposedLinear(4, 4), X, "output"
    ),
    "flax: SAME at stride 2": Case(
        nnx.Conv(4, 4, (3, 3), 2, rngs=RNGS), torch.nn.Conv2d(4, 4, 3, 2, 1), IMAGES,
        "output", layout="image",
    ),
    "flax: tanh GELU": Case(jax.nn.gelu, F.gelu, X, "output"),
    "torch: tanh GELU": Case(functional.gelu, torch.nn.GELU("tanh"), X, "output"),
    "flax: one-pass variance": Case(one_pass, torch_two_pass, FAR, "output", Verdict.JAX_WORSE),
    "flax: dropped NaN": Case(
        lambda x: jnp.where(jnp.asarray(kept(x))[None], x, 0) / 0.75, torch_dropped, HOLED, "output"
    ),
    "torch: dropped NaN": Case(
        dropped, lambda x: torch.where(torch.tensor(kept(x)), x / 0.75, 0), HOLED, "output"
    ),
    "flax: float32 inside": Case(
        lambda x: functional.gelu(x.astype("float32")).astype(x.dtype), F.gelu, X, "output"
    ),
    "flax: no dropout scale": Case(lambda x: dropped(x) * 0.75, torch_dropped, X, "output"),
    "flax: no gradient": Case(
        lambda x: functional.gelu(x) + 0 * jax.lax.stop_gradient(x) - jax.lax.stop_gradient(x) + x,
        F.gelu, X, "grad input 0",
    ),
    "torch: no parameter gradient": Case(norms.LayerNorm(4), NoGammaGradient(4), X, "grad weight"),
    "flax: scaled by 1 + 1e-10": Case(
        lambda x: functional.gelu(x) * (1 + 1e-10), F.gelu, X, "output"
    ),
}  # fmt: skip


def run(case: Case) -> parity.Report:
    dtypes = (np.float32,) if case.verdict == Verdict.JAX_WORSE else ()
    return parity.compare(case.ours, case.theirs, case.inputs, layout=case.layout, dtypes=dtypes)


@pytest.mark.parametrize("case", SOUND.values(), ids=SOUND)
def test_sound_sides_agree(case: Case) -> None:
    report = parity.compare(case.ours, case.theirs, case.inputs, layout=case.layout)
    assert report.passed, str(report)
    names = {finding.name for finding in report.findings}
    assert {"output", "grad input 0", "evaluation"} <= names


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_where_it_is(case: Case) -> None:
    report = run(case)
    assert not report.passed
    failed = {(finding.name, finding.verdict) for finding in report.findings if not finding.passed}
    assert (case.quantity, case.verdict) in failed
    assert case.quantity in str(report)


def test_a_fault_of_momentum_shows_in_the_statistics_and_in_evaluation_only() -> None:
    failed = {f.name for f in run(FAULTS["flax: momentum"]).findings if not f.passed}
    assert failed == {
        *(f"step {n} running_{name}" for n in (1, 2, 10) for name in ("mean", "var")),
        *("evaluation", "after evaluation running_mean", "after evaluation running_var"),
    }


def test_a_fault_of_torch_is_told_as_torchs() -> None:
    report = parity.compare(two_pass, torch_one_pass, FAR)
    assert report.passed
    verdicts = {f.verdict for f in report.findings if f.dtype == "float32"}
    assert Verdict.TORCH_WORSE in verdicts
    assert Verdict.JAX_WORSE not in verdicts


def test_every_quantity_is_named_as_in_torch() -> None:
    report = parity.compare(batch_norm(), torch.nn.BatchNorm2d(4), IMAGES, layout="image")
    wide = {f.name for f in report.findings if f.dtype == "float64"}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert wide == {
        *("output", "evaluation", "grad input 0", "grad weight", "grad bias"),
        *(f"step {n} {name}" for n in (1, 2, 10) for name in buffers),
        *(f"after evaluation {name}" for name in buffers),
        *("step 2 output", "step 10 output"),
    }
    # Counts are exact: precision has nothing to say about them.
    low = {f.name for f in report.findings if f.dtype == "float32"}
    assert low == {name for name in wide if "num_batches" not in name}


def test_the_precisions_are_those_asked_for() -> None:
    kinds = (np.float32, jnp.bfloat16)
    report = parity.compare(functional.gelu, F.gelu, X, dtypes=kinds)
    assert {f.dtype for f in report.findings} == {"float64", "float32", "bfloat16"}
    assert {f.dtype for f in parity.compare(functional.gelu, F.gelu, X, dtypes=()).findings} == {
        "float64"
    }


def test_the_modules_that_are_compared_do_not_change() -> None:
    ours, theirs = batch_norm(), torch.nn.BatchNorm2d(4)
    torch.nn.init.constant_(theirs.weight, 3.0)
    parity.compare(ours, theirs, IMAGES, layout="image", dtypes=())
    assert ours.scale[...].tolist() == [1.0] * 4
    assert int(ours.count[...]) == int(theirs.num_batches_tracked) == 0
    assert ours.use_running_average is False
    assert theirs.training


def test_the_weights_are_carried_from_torch() -> None:
    theirs = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(theirs.weight, 2.0)
    torch.nn.init.constant_(theirs.bias, -1.0)
    report = parity.compare(linear.Linear(4, 2, rngs=RNGS), theirs, X, dtypes=())
    assert report.passed


def test_integer_inputs_are_given_and_not_differentiated() -> None:
    rows = np.array([[0, 2], [3, 3]])
    report = parity.compare(lambda i, x: x[i], lambda i, x: x[i], rows, X)
    assert report.passed
    names = {f.name for f in report.findings}
    assert "grad input 0" in names
    assert "grad input 1" not in names


def test_a_layer_that_pins_float32_is_found() -> None:
    ids = np.array([[0, 2], [3, 3]])
    report = parity.compare(nnx.Embed(5, 4, rngs=RNGS), torch.nn.Embedding(5, 4), ids, dtypes=())
    assert not report.passed
    assert report.worst.explanation == "the dtypes differ: float32 and float64"
    assert "look at: layers that pin a lower precision: the model (dtype=float32)" in str(report)


def test_a_parameter_that_is_not_used_has_gradient_zero_on_both_sides() -> None:
    class Ours(nnx.Module):
        def __init__(self) -> None:
            self.used, self.idle = (linear.Linear(4, 4, rngs=RNGS) for _ in range(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.used(x)

    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = parity.compare(Ours(), Theirs(), X, dtypes=())
    assert report.passed
    assert "grad idle.weight" in {f.name for f in report.findings}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (lambda: norms.LayerNorm(4), lambda: torch.nn.LayerNorm(4, bias=False), "missing: bias"),
        (lambda: norms.LayerNorm(4, bias=False), lambda: torch.nn.LayerNorm(4), "unexpected: bias"),
        (lambda: functional.gelu, torch.nn.PReLU, "a function has no parameters, got .* weight"),
        (lambda: norms.LayerNorm(4), lambda: F.gelu, "missing: weight, bias"),
        (
            lambda: lambda x: x[:2],
            lambda: F.gelu,
            r"one shape, got output \(2, 4\) .* and \(8, 4\)",
        ),
    ],
    ids=["missing", "unexpected", "function", "torch function", "shape"],
)
def test_sides_of_other_structure_are_refused_with_the_place(
    ours: Callable[[], object], theirs: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parity.compare(ours(), theirs(), X)


def test_a_buffer_that_flax_does_without_is_noted() -> None:
    report = parity.compare(
        nnx.BatchNorm(4, momentum=0.9, rngs=RNGS), torch.nn.BatchNorm1d(4), X, dtypes=()
    )
    found = {f.name: f for f in report.findings}
    assert report.notes == ("num_batches_tracked (the Flax layer does without)",)
    assert "not compared: num_batches_tracked" in str(report)
    assert not found["step 1 running_var"].passed  # nnx follows the biased variance
    assert found["step 1 running_mean"].passed


class Noisy(nnx.Module):
    def __init__(self) -> None:
        self.lin = linear.Linear(4, 4, rngs=nnx.Rngs(0))
        self.drop = dropout.Dropout(0.3, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.lin(x))


class TorchNoisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop = torch.nn.Linear(4, 4), torch.nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.lin(x))


def test_models_with_dropout_are_compared_with_the_same_masks() -> None:
    report = parity.compare(Noisy(), TorchNoisy(), X)
    assert report.passed, str(report)


def test_both_sides_are_trained_whatever_their_mode() -> None:
    ours, theirs = norms.BatchNorm(4, momentum=0.9), torch.nn.BatchNorm1d(4).eval()
    ours.eval()
    report = parity.compare(ours, theirs, X, dtypes=())
    assert not {f.name: f for f in report.findings}["step 2 running_mean"].passed
    assert ours.use_running_average
    assert not theirs.training


def test_an_output_of_another_dtype_is_found() -> None:
    ours, theirs = nnx.Linear(4, 4, rngs=RNGS), torch.nn.Linear(4, 4)
    report = parity.compare(ours, theirs, X, dtypes=(jnp.bfloat16,))
    found = {(f.name, f.dtype): f for f in report.findings}
    assert found["output", "bfloat16"].explanation.startswith("the dtypes differ: float32")


def test_running_statistics_stay_in_float32_on_both_sides_of_a_bfloat16_run() -> None:
    fed = Inputs((X,), {"output": np.ones_like(X)}, None).rounded(jnp.bfloat16)
    low = Precision(jnp.bfloat16, jnp.bfloat16)
    ours = FlaxSide(NNXProgram(norms.BatchNorm(4)))
    for side in (ours, TorchSide(torch.nn.BatchNorm1d(4))):
        found = side.run(fed, low)
        assert found["output"].dtype == jnp.bfloat16
        assert found["step 10 running_var"].dtype == np.float32


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be 'image' or None, got layout='nchw'"):
        parity.compare(norms.LayerNorm(4), torch.nn.LayerNorm(4), X, layout="nchw")


def test_a_forgotten_layout_is_named() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"layout='image'|channels"):
        parity.compare(conv(), torch.nn.Conv2d(4, 4, 3), IMAGES)


def test_the_report_shows_what_failed_or_the_worst_that_passed() -> None:
    report = run(FAULTS["flax: tanh GELU"])
    first, second = str(report).splitlines()[:2]
    assert first == "semantics_differ: 3 semantics_differ of 3 quantities"
    assert second.startswith("  semantics_differ: output in float64: the sides differ by")
    assert report.worst.passed is False
    sound = run(SOUND["gelu"])
    first, second = str(sound).splitlines()
    assert first == "agree: 3 agree of 3 quantities"
    assert second.startswith(f"  agree: {sound.worst.name} in float64")
