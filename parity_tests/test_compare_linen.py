"""``compare`` of Linen modules with their variables."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

from flaxstab import parity
from flaxstab.parity import Verdict
from parity_tests.support.cases import values
from parity_tests.support.pairs import BiasedBatchNorm, failures, finding, refusal

IMAGES = values(4, 6, 6, 3)
X = values(8, 4)


class Model(nn.Module):
    """Convolution, BatchNorm, GroupNorm, LayerNorm and a head."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, off: float = 0.0) -> jax.Array:
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        x = nn.BatchNorm(not train, momentum=0.9, use_fast_variance=False, name="bn")(x)
        x = nn.relu(nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False, name="gn")(x))
        x = nn.LayerNorm(self.eps, use_fast_variance=False, name="ln")(x.mean((1, 2)))
        return nn.Dense(2, name="head")(x) + off


class TorchModel(torch.nn.Module):
    def __init__(self, batch_norm: type[torch.nn.BatchNorm2d] = BiasedBatchNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), batch_norm(4), torch.nn.GroupNorm(2, 4), torch.nn.ReLU()
        )
        self.norm, self.fc = torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.features(x).mean((2, 3))))


NAMES = {
    "features.0": "conv", "features.1": "bn", "features.2": "gn", "norm": "ln", "fc": "head",
}  # fmt: skip


def flax_name(name: str) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{NAMES[module]}.{tensor}"


def linen(module: nn.Module, x: np.ndarray, **modes: Mapping[str, object]) -> parity.Linen:
    variables = module.init(jax.random.key(1), jnp.asarray(x, jnp.float32))
    return parity.Linen(module, variables, **modes)


def modes(module: nn.Module | None = None) -> parity.Linen:
    chosen = Model() if module is None else module
    return linen(chosen, IMAGES, training={"train": True}, evaluation={"train": False})


def compare(
    ours: parity.Linen, theirs: torch.nn.Module, weights: str | None = "torch",
    dtypes: tuple[object, ...] = (),
) -> parity.Report:  # fmt: skip
    return parity.compare(
        ours, theirs, IMAGES, layout="image", rename=flax_name, weights=weights, dtypes=dtypes
    )


COUNT = "bn.num_batches_tracked (the Flax layer does without)"


@pytest.mark.parametrize("weights", ["torch", "flax"])
def test_a_linen_model_agrees_with_its_twin_by_torchs_names(weights: str) -> None:
    report = compare(modes(), TorchModel(), weights)
    assert report.passed, str(report)
    assert report.notes == (COUNT,)
    names = {f.name for f in report.findings}
    assert {"grad conv.weight", "grad gn.bias", "grad ln.weight", "grad head.bias"} <= names
    assert {f"step {n} bn.running_{kind}" for n in (1, 2, 10) for kind in ("mean", "var")} <= names
    assert {"output", "evaluation", "grad input 0"} <= names


def test_a_linen_model_agrees_in_float32() -> None:
    report = compare(modes(), TorchModel(), dtypes=(np.float32,))
    assert report.passed, str(report)
    assert finding(report, "output", "float32").verdict == Verdict.AGREE


def test_without_weights_each_side_keeps_its_own() -> None:
    assert "output" in failures(compare(modes(), TorchModel(), None))


def test_linen_batch_norm_follows_the_biased_variance() -> None:
    report = compare(modes(), TorchModel(torch.nn.BatchNorm2d))
    failed = failures(report)
    assert {*(f"step {n} bn.running_var" for n in (1, 2, 10)), "evaluation"} <= failed
    assert not any("running_mean" in name or "grad" in name for name in failed)
    assert report.notes == (COUNT,)


def test_linens_default_eps_is_found() -> None:
    report = compare(modes(Model(eps=1e-6)), TorchModel())
    failed = failures(report)
    assert {"output", "evaluation", "grad conv.weight", "grad ln.weight"} <= failed
    assert "grad head.bias" not in failed


@pytest.mark.parametrize(
    ("training", "evaluation", "failed"),
    [
        ({"train": True}, {}, set()),
        ({"train": True}, {"off": 1e-9}, {"evaluation"}),
        ({"train": True, "off": 1e-9}, {}, {"output"}),
        ({}, {}, {"output", "step 1 bn.running_mean", "step 10 bn.running_var"}),
    ],
    ids=["right", "in evaluation", "in training", "training evaluates"],
)
def test_each_mode_has_its_keyword_arguments(
    training: Mapping[str, object], evaluation: Mapping[str, object], failed: set[str]
) -> None:
    ours = linen(Model(), IMAGES, training=training, evaluation=evaluation)
    found = failures(compare(ours, TorchModel()))
    assert failed <= found
    if "train" in training:
        assert found - {"step 2 output", "step 10 output"} == failed


class Plain(nn.Module):
    """No statistics, no mode."""

    fast: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(1e-5, use_fast_variance=self.fast, name="0")(x)
        return nn.Dense(3, name="1")(x)


def torch_plain() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))


def test_a_module_without_statistics_needs_no_arguments() -> None:
    ours = linen(Plain(), X)
    assert set(ours.variables) == {"params"}
    report = parity.compare(ours, torch_plain(), X)
    assert report.passed, str(report)
    steps = {f.name for f in report.findings if f.name.startswith("step")}
    assert steps == {"step 2 output", "step 10 output"}
    scaled = torch.nn.Sequential(*torch_plain(), torch.nn.LeakyReLU(1 - 1e-9))
    assert "output" in failures(parity.compare(ours, scaled, X, dtypes=()))


def test_linens_default_variance_of_one_pass_is_worse_in_float32() -> None:
    far = values(8, 4, offset=1e3, scale=1.0)
    ours = [linen(Plain(fast), far) for fast in (False, True)]
    slow, fast = (parity.compare(side, torch_plain(), far) for side in ours)
    assert slow.passed, str(slow)
    assert not failures(fast)
    assert {"output", "evaluation"} <= failures(fast, "float32")
    assert (fast.verdict, fast.side) == (Verdict.JAX_WORSE, "jax")


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(x)


def test_a_module_without_variables_is_compared() -> None:
    x = X - 3
    assert parity.compare(parity.Linen(Nothing(), {}), torch.nn.ReLU(), x).passed
    assert not parity.compare(parity.Linen(Nothing(), {}), torch.nn.ELU(), x).passed


def test_the_variables_that_were_given_do_not_change() -> None:
    ours = modes()
    before = jax.tree.map(np.array, ours.variables)
    compare(ours, TorchModel())
    same = jax.tree.map(lambda a, b: np.array_equal(a, np.asarray(b)), before, ours.variables)
    assert jax.tree.all(same)


def test_a_wrong_gradient_names_its_side() -> None:
    class Detached(TorchModel):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.features(x).mean((2, 3)))
            return torch.nn.functional.linear(y, self.fc.weight, self.fc.bias.detach())

    report = compare(modes(), Detached())
    assert failures(report) == {"grad head.bias"}
    assert report.side == "torch"


def test_weights_of_another_shape_or_name_are_refused() -> None:
    wide = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 5))
    message = refusal(lambda: parity.compare(linen(Plain(), X), wide, X))
    assert "1.weight" in message
    message = refusal(lambda: parity.compare(modes(), TorchModel(), IMAGES, layout="image"))
    assert "rename=" in message
