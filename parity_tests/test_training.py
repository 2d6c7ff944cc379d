"""Whole training runs of the mini project (document 2, M): JAX against PyTorch, step by step."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.nn import functional as F  # noqa: N812

from flaxstab import functional, interop, models, optim, parity
from flaxstab.parity._verdict import SEMANTICS
from torch_ref import models as torch_models
from torch_ref import optim as torch_optim
from torch_ref import training

STEPS = 64
BATCH = 16
WARMUP = 16
SMALL = {"widths": (4, 8), "groups": 2, "image_size": 8, "drop": 0.1}
VARIANTS = {"batch": "relu", "group": "gelu", "layer": "gelu"}
DATA = Path(__file__).parents[1] / "examples" / "data" / "cifar10_small.npz"

TorchStep = Callable[..., float]


@functools.cache
def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Slices of real images, averaged down to 8 pixels, standardised by nothing but 1 / 64."""
    if not DATA.is_file():
        pytest.skip("the examples' images are not part of the wheel")
    with np.load(DATA) as data:
        images = data["train_images"][: STEPS * BATCH].astype(np.float64)
        labels = data["train_labels"][: STEPS * BATCH].astype(np.int64)
    # (N, 32, 32, 3) -> (N, 8, 4, 8, 4, 3) -> (N, 8, 8, 3)
    images = images.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4)) / 64
    return [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, STEPS * BATCH, BATCH)]


def make_optimizer(model: nnx.Module) -> nnx.Optimizer:
    schedule = optim.warmup_cosine(training.PEAK, WARMUP, STEPS)
    adamw = optim.adamw(schedule, weight_decay=0.05, mask=optim.decay_mask(model))
    tx = optax.chain(optim.clip_grad_norm(training.CLIP), adamw)
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def make_torch_optimizer(model: torch.nn.Module) -> tuple[object, object]:
    optimizer = torch.optim.AdamW(torch_optim.mini_project_groups(model), lr=1.0)
    schedule = functools.partial(training.warmup_cosine, warmup_steps=WARMUP, total_steps=STEPS)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> jax.Array:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
        merged = nnx.merge(graph, params, rest, copy=True)
        loss = functional.cross_entropy(merged(x), labels, label_smoothing=training.LABEL_SMOOTHING)
        return loss, nnx.state(merged, nnx.Not(nnx.Param))

    (loss, after), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    nnx.update(model, after)
    optimizer.update(model, gradients)
    return loss


def against_torch(norm: str, torch_step: TorchStep, steps: int = STEPS) -> parity.Report:
    def scheduled(model: torch.nn.Module, made: object, *batch: torch.Tensor) -> float:
        optimizer, scheduler = made
        loss = torch_step(model, optimizer, *batch)
        scheduler.step()
        return loss

    torch.manual_seed(1)
    twin = torch_models.StableCNN(norm, VARIANTS[norm], **SMALL)
    model = models.StableCNN(norm, VARIANTS[norm], **SMALL, rngs=nnx.Rngs(3))
    return parity.trajectory(
        parity.TrainStep(model, make_optimizer, step),
        parity.TrainStep(twin, make_torch_optimizer, scheduled),
        batches(),
        steps=steps,
        layout="image",
    )


@pytest.mark.parametrize("norm", VARIANTS)
def test_64_steps_of_training_agree_in_every_step(norm: str) -> None:
    report = against_torch(norm, training.train_step)
    assert report.passed, str(report)
    kinds = {finding.name.split()[0] for finding in report.findings}
    assert {"loss", "param", "update", "exp_avg", "exp_avg_sq", "step"} <= kinds
    assert ("buffer" in kinds) == (norm == "batch")


def _decay_after(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    """The step as document 2 prints it: the decay follows the Adam step."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    loss = training.train_step(model, optimizer, x, y)
    with torch.no_grad():
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * decay)
    return loss


def _biased_variance(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    before = [block.norm.running_var.clone() for block in model.blocks]
    loss = training.train_step(model, optimizer, x, y)
    size = x.numel() // x.shape[1]
    for block, old in zip(model.blocks, before, strict=True):
        taken = block.norm.running_var - 0.9 * old
        block.norm.running_var = 0.9 * old + taken * (size - 1) / size
        size //= 4
    return loss


def _no_smoothing(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.CLIP)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("planted", "kind"),
    [(_decay_after, "update"), (_biased_variance, "buffer"), (_no_smoothing, "loss")],
)
def test_a_planted_fault_is_found_within_2_steps(planted: TorchStep, kind: str) -> None:
    report = against_torch("batch", planted, steps=2)
    assert not report.passed
    failed = {finding.name.split()[0] for finding in report.findings if not finding.passed}
    assert kind in failed


def _arrays(model: nnx.Module, optimizer: nnx.Optimizer) -> dict[str, np.ndarray]:
    moments = jax.tree.leaves(nnx.as_pure(nnx.state(optimizer)))
    named = {f"optimizer {n}": np.asarray(leaf, np.float64) for n, leaf in enumerate(moments)}
    return {**interop.state_dict(model), **named}


def _assert_same_numbers(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        bound = SEMANTICS * np.max(np.abs(array), initial=0)
        assert np.max(np.abs(found[name] - array), initial=0) <= bound, name


class Pair(NamedTuple):
    """A model and its optimizer."""

    model: nnx.Module
    optimizer: nnx.Optimizer


RunStep = Callable[[Pair, jax.Array, jax.Array], jax.Array]


def _two_steps(run_step: RunStep) -> tuple[dict[str, np.ndarray], float]:
    model = models.StableCNN("batch", "relu", **SMALL, param_dtype=jnp.float64, rngs=nnx.Rngs(3))
    sides = Pair(model, make_optimizer(model))
    for images, labels in batches()[:2]:
        loss = run_step(sides, jnp.asarray(images), jnp.asarray(labels))
    return _arrays(sides.model, sides.optimizer), float(loss)


@functools.cache
def _one_device() -> tuple[dict[str, np.ndarray], float]:
    compiled = nnx.jit(step)
    return _two_steps(lambda t, x, y: compiled(t.model, t.optimizer, x, y))


def test_the_step_gives_the_same_numbers_under_jax_jit_with_split_and_merge() -> None:
    @functools.partial(jax.jit, static_argnums=0)
    def call(
        graph: object, state: nnx.State, x: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, nnx.State]:
        model, optimizer = nnx.merge(graph, state)
        loss = step(model, optimizer, x, labels)
        return loss, nnx.state((model, optimizer))

    def pure(sides: Pair, x: jax.Array, labels: jax.Array) -> jax.Array:
        graph, state = nnx.split((sides.model, sides.optimizer))
        loss, after = call(graph, state, x, labels)
        nnx.update((sides.model, sides.optimizer), after)
        return loss

    with jax.enable_x64(True):
        (expected, loss), (found, pure_loss) = _one_device(), _two_steps(pure)
        _assert_same_numbers(found, expected)
        assert abs(loss - pure_loss) <= SEMANTICS * loss


def test_a_batch_spread_over_8_devices_gives_the_numbers_of_one() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    compiled = nnx.jit(step)

    def sharded(sides: Pair, x: jax.Array, labels: jax.Array) -> jax.Array:
        both = (sides.model, sides.optimizer)
        nnx.update(both, jax.device_put(nnx.state(both), everywhere))
        x, labels = (jax.device_put(a, spread) for a in (x, labels))
        assert len(x.sharding.device_set) == 8
        return compiled(*both, x, labels)

    with jax.enable_x64(True):
        (expected, loss), (found, sharded_loss) = _one_device(), _two_steps(sharded)
        _assert_same_numbers(found, expected)
        assert abs(loss - sharded_loss) <= SEMANTICS * loss
