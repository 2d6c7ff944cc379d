"""``compare`` of training steps finds a fault in its first step and names its side."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import functional, linear, parity
from parity_tests.support.cases import values
from parity_tests.support.pairs import Net, TorchNet, failures, finding, refusal
from parity_tests.support.training import (
    RATE,
    ours,
    plain,
    sgd,
    small,
    step,
    theirs,
    torch_small,
    torch_step,
)

BATCH = (values(16, 4), values(16, 2, seed=1, offset=0.0, scale=1.0))
Optimizer = torch.optim.Optimizer


PARAMS = {"stem.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_a_net_with_batch_norm_and_dropout_agrees_in_float64_and_float32() -> None:
    report = parity.compare(ours(), theirs(), *BATCH)
    assert report.passed, str(report)
    assert report.side == ""
    assert report.departure is None
    buffers = {f"buffer norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    kinds = ("param", "update", "momentum_buffer")
    assert {f.name for f in report.findings if f.dtype == "float64"} == {
        "loss", *buffers, *(f"{kind} {name}" for kind in kinds for name in PARAMS)
    }  # fmt: skip
    assert {"loss", "param stem.weight"} <= {
        f.name for f in report.findings if f.dtype == "float32"
    }


class Evaluating(Net):
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = self.norm(self.stem(x), use_running_average=True)
        return self.head(self.drop(jax.nn.relu(normal)))


def evaluating(model: torch.nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    model.norm.eval()
    return torch_step(model, optimizer, x, y)


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_batch_norm_in_evaluation_mode_during_the_step_is_found(side: str) -> None:
    """In float64 and from the first step on; the witness names the side."""
    report = parity.compare(
        ours(model=Evaluating() if side == "jax" else None),
        theirs(step=evaluating if side == "torch" else torch_step),
        *BATCH,
        dtypes=(),
        witness=theirs(),
    )
    assert report.departure is not None
    assert report.departure.step == 1
    assert {"loss", "buffer norm.running_mean", "update head.weight"} <= failures(report)
    assert report.side == side


def repeated(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    count = model.drop.rngs.count[...]
    loss = step(model, optimizer, x, y)
    model.drop.rngs.count[...] = count
    return loss


def test_the_same_dropout_mask_in_every_step_is_found() -> None:
    report = parity.compare(ours(step=repeated), theirs(), *BATCH, dtypes=())
    assert failures(report) == {"draws drop"}
    assert report.side == "jax"
    assert "the same mask was drawn twice" in finding(report, "draws drop").explanation


def skipped(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    del optimizer
    return jnp.mean((model(x) - y) ** 2)


def scaled(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Forgets to divide the gradients of a scaled loss."""

    def loss_of(model: nnx.Module) -> jax.Array:
        return 8 * jnp.mean((model(x) - y) ** 2)

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss / 8


def torch_skipped(model: torch.nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    return loss


def torch_scaled(model: torch.nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = 8 * ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss / 8


def accumulating(model: torch.nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def faster(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE * (1 + 1e-6))


def decaying(decay: float) -> Callable[[torch.nn.Module], torch.optim.SGD]:
    def make(model: torch.nn.Module) -> torch.optim.SGD:
        groups = [
            {"params": [model.first.weight, model.last.weight], "weight_decay": 0.1},
            {"params": [model.first.bias, model.last.bias], "weight_decay": decay},
        ]
        return torch.optim.SGD(groups, lr=RATE)

    return make


def no_bias(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda a: a.ndim > 1, params)


SGD = optax.sgd(RATE)
DECAY = optax.chain(optax.add_decayed_weights(0.1, no_bias), SGD)


def summed(
    updates: optax.Updates, state: optax.Updates, params: optax.Params | None = None
) -> tuple[optax.Updates, optax.Updates]:
    del params
    total = jax.tree.map(jnp.add, updates, state)
    return total, total


ZEROS = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), summed)
ACCUMULATED = optax.chain(ZEROS, SGD)  # as if the gradients were never set to zero
FAULTS = {
    "jax: learning rate": (small(optax.sgd(RATE * (1 + 1e-6))), torch_small(plain), 1),
    "torch: learning rate": (small(SGD), torch_small(faster), 1),
    "jax: decay of a bias": (
        small(optax.chain(optax.add_decayed_weights(0.1), SGD)), torch_small(decaying(0.0)),
        1,
    ),
    "torch: decay of a bias": (small(DECAY), torch_small(decaying(0.1)), 1),
    "jax: gradients are not zeroed": (small(ACCUMULATED), torch_small(plain), 2),
    "torch: gradients are not zeroed": (small(SGD), torch_small(plain, accumulating), 2),
    "jax: no update": (small(SGD, skipped), torch_small(plain), 1),
    "torch: no update": (small(SGD), torch_small(plain, torch_skipped), 1),
    "jax: loss scale": (small(SGD, scaled), torch_small(plain), 1),
    "torch: loss scale": (small(SGD), torch_small(plain, torch_scaled), 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_its_step_and_named_by_the_witness(fault: str) -> None:
    one, other, first = FAULTS[fault]
    good = torch_small(decaying(0.0) if "decay" in fault else plain)
    report = parity.compare(one, other, *BATCH, dtypes=(), witness=good)
    assert report.departure is not None
    assert report.departure.step == first
    assert report.departure.name.startswith(("update", "param"))
    assert {"update first.bias", "param first.bias", "loss"} <= failures(report)
    assert report.side == fault.split(":", maxsplit=1)[0]
    assert finding(report, "loss").explanation.startswith(f"at step {first + 1} ")


def test_the_sound_sides_of_the_faults_agree() -> None:
    pairs = [
        (small(SGD), torch_small(plain)),
        (small(DECAY), torch_small(decaying(0.0))),
        (small(ACCUMULATED), torch_small(plain, accumulating)),
    ]
    for one, other in pairs:
        report = parity.compare(one, other, *BATCH, dtypes=())
        assert report.passed, str(report)


def milestones(model: torch.nn.Module) -> tuple[Optimizer, object]:
    optimizer = plain(model)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [5])


def test_a_scheduler_comes_with_its_optimizer_in_a_tuple() -> None:
    schedule = optax.piecewise_constant_schedule(RATE, {5: 0.1})
    report = parity.compare(small(optax.sgd(schedule)), torch_small(milestones), *BATCH)
    assert report.passed, str(report)


@pytest.mark.parametrize(("boundary", "first"), [(4, 5), (6, 6)])
def test_the_departure_is_the_step_in_which_a_fault_begins(boundary: int, first: int) -> None:
    schedule = optax.piecewise_constant_schedule(RATE, {boundary: 0.1})
    report = parity.compare(small(optax.sgd(schedule)), torch_small(milestones), *BATCH)
    found = report.departure
    assert found is not None
    assert (found.step, found.name.split()[0], found.dtype) == (first, "update", "float64")
    assert found.excess > 1
    assert f"first apart: {found.name} after step {first}, in float64" in str(report)
    assert finding(report, "loss").explanation.startswith(f"at step {first + 1} ")


def test_the_learning_rate_of_the_net_is_seen_through_batch_norm_and_dropout() -> None:
    report = parity.compare(ours(optax.sgd(RATE * (1 + 1e-6), 0.9)), theirs(sgd), *BATCH, dtypes=())
    assert {f"update {name}" for name in PARAMS} <= failures(report)
    assert "buffer norm.num_batches_tracked" not in failures(report)


def test_neither_model_is_changed_by_training() -> None:
    model, module = Net(), TorchNet()
    kernel, weight = np.asarray(model.stem.kernel[...]), module.stem.weight.clone()
    parity.trajectory(ours(model=model), theirs(model=module), [BATCH], steps=2)
    np.testing.assert_array_equal(kernel, np.asarray(model.stem.kernel[...]))
    assert torch.equal(weight, module.stem.weight)
    assert int(model.norm.count[...]) == int(module.norm.num_batches_tracked) == 0


class Picture(nnx.Module):
    def __init__(self) -> None:
        self.conv = linear.Conv(3, 4, 3, rngs=nnx.Rngs(0))
        self.head = linear.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.conv(x)).mean((1, 2)))


class TorchPicture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)).mean((2, 3)))


def classify(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda m: functional.cross_entropy(m(x), y))(model)
    optimizer.update(model, gradients)
    return loss


def torch_classify(model: torch.nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


IMAGES = (values(4, 5, 5, 3, offset=0.5, scale=1.0), np.array([0, 2, 1, 1]))


def pictures(weights: str | None, layout: str | None = "image") -> parity.Report:
    return parity.compare(
        ours(optax.sgd(RATE), Picture(), nnx.jit(classify)),
        theirs(plain, TorchPicture(), torch_classify),
        *IMAGES,
        layout=layout, weights=weights, rename=lambda name: name.replace("stem", "conv"), dtypes=(),
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["torch", "flax"])
def test_images_and_labels_and_other_names_are_trained_on_alike(weights: str) -> None:
    report = pictures(weights)
    assert report.passed, str(report)
    assert {"loss", "param conv.weight", "update head.bias"} <= {f.name for f in report.findings}


def test_without_weights_each_model_starts_from_its_own() -> None:
    report = pictures(None)
    assert report.departure is not None
    assert report.departure.step == 1
    assert {"loss", "param conv.weight"} <= failures(report)


def test_a_forgotten_layout_names_the_layer() -> None:
    message = refusal(lambda: pictures("torch", None))
    assert "the PyTorch side must run on its inputs, got RuntimeError in stem (Conv2d" in message


def test_a_tolerance_widens_what_it_names_in_training_too() -> None:
    off = small(optax.sgd(RATE * (1 + 1e-9)))
    wider = (parity.Tolerance("update *", 1e6, "the rate is rounded"),)
    report = parity.compare(off, torch_small(plain), *BATCH, dtypes=(), tolerances=wider)
    failed = failures(report)
    assert "param first.weight" in failed
    assert not any(name.startswith("update") for name in failed)
    assert "tolerance: update * x1e+06, because the rate is rounded" in str(report)
