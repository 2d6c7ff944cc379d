"""``flaxstab.interop``: optimizers move between torch and JAX in the middle of training."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import attention, interop, linear, norms, optim
from flaxstab.parity._lockstep import LONG
from parity_tests.support.cases import values
from parity_tests.support.layers import SEMANTICS

T = torch.nn
Tensors = Mapping[str, np.ndarray]
StateDict = dict[str, object]


def assert_same_after(steps: int, ours: Tensors, theirs: Tensors) -> None:
    """Every tensor within 1e-12 of its size for each step, 1e-10 at most (DESIGN, "parity")."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        error = np.max(np.abs(ours[name] - expected), initial=0)
        bound = min(SEMANTICS * steps, LONG) * np.max(np.abs(expected), initial=0)
        assert error <= bound, f"{name}: error {error:.3g} is above the bound {bound:.3g}"


def arrays_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    return {
        f"{i} {key}": np.asarray(value)
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


RATE, DECAY = 0.02, 0.1


def rate(count: object) -> object:
    return RATE / (1 + 0.2 * count)


class Wide(nnx.Module):
    """Layers of which PyTorch turns, flips or packs the parameters."""

    def __init__(self) -> None:
        kind = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.attn = attention.MultiHeadAttention(4, 2, **kind)
        self.conv = linear.Conv(2, 3, (3, 2), **kind)
        self.embed = linear.Embed(3, 4, **kind)
        self.norm = norms.BatchNorm(4, **kind)
        self.up = linear.ConvTranspose(2, 3, (3, 2), **kind)


wide = cache(Wide)


def wide_twin() -> torch.nn.Module:
    torch.manual_seed(2)
    layers = {
        "up": T.ConvTranspose2d(2, 3, (3, 2)),
        "norm": T.BatchNorm1d(4),
        "embed": T.Embedding(3, 4),
        "conv": T.Conv2d(2, 3, (3, 2)),
        "attn": T.MultiheadAttention(4, 2),
    }
    return T.ModuleDict(layers).double()


def gradients(module: torch.nn.Module, step: int) -> dict[str, np.ndarray]:
    scale = (1.0, 0.1, 10.0)[step % 3]
    return {
        name: scale * values(*p.shape, seed=100 * step + i, offset=0.1)
        for i, (name, p) in enumerate(module.named_parameters())
    }


def as_state(model: Wide, tensors: Tensors) -> nnx.State:
    """Returns tensors of torch's as a tree of JAX's gradients."""
    other = nnx.clone(model)
    interop.load_state_dict(other, tensors, strict=False)
    return nnx.as_pure(nnx.state(other, nnx.Param))


class Variant(NamedTuple):
    """An optimizer on both sides; torch's takes the parameters, or groups of them."""

    ours: Callable[[Wide], optax.GradientTransformation]
    theirs: Callable[..., torch.optim.Optimizer]
    groups: bool = False


def grouped(model: Wide) -> optax.GradientTransformation:
    rules = [{"params": nnx.PathContains("bias"), "weight_decay": 0.0}]
    return optim.param_groups(model, rules).optimizer(
        optim.adamw, learning_rate=rate, weight_decay=DECAY
    )


Injected = optax.inject_hyperparams(optax.adamw)
VARIANTS = {
    "optim.adamw": Variant(
        lambda _: optim.adamw(rate, weight_decay=DECAY, own_steps=True),
        partial(torch.optim.AdamW, weight_decay=DECAY),
    ),
    "optim.adam, amsgrad": Variant(
        lambda _: optim.adam(rate, weight_decay=DECAY, amsgrad=True),
        partial(torch.optim.Adam, weight_decay=DECAY, amsgrad=True),
    ),
    "optim.param_groups": Variant(grouped, partial(torch.optim.AdamW, weight_decay=DECAY), True),
    "optim.sgd": Variant(
        lambda _: optim.sgd(rate, 0.9, 0.3, DECAY),
        partial(torch.optim.SGD, momentum=0.9, dampening=0.3, weight_decay=DECAY),
    ),
    "optim.sgd without momentum": Variant(lambda _: optim.sgd(rate), torch.optim.SGD),
    "guarded, in a chain": Variant(
        lambda _: optim.skip_nonfinite(optax.chain(optim.clip_grad_norm(1e9), optim.adam(rate))),
        torch.optim.Adam,
    ),
    "optax.adamw": Variant(
        lambda _: optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(rate, weight_decay=0.1)),
        partial(torch.optim.AdamW, weight_decay=0.1),
    ),
    "optax.adamw, injected": Variant(
        lambda _: Injected(rate, weight_decay=0.1), partial(torch.optim.AdamW, weight_decay=0.1)
    ),
    "optax.adam, masked": Variant(
        lambda _: optax.masked(optax.adam(rate), lambda p: jax.tree.map(lambda _: True, p)),
        torch.optim.Adam,
    ),
    "optax.sgd": Variant(
        lambda _: optax.sgd(rate, 0.9, nesterov=True),
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    ),
}
OUT, IN, END = 3, 5, 8  # the steps at which a run leaves torch, comes back, and ends


def take(optimizer: torch.optim.Optimizer, module: torch.nn.Module, steps: range) -> None:
    for step in steps:
        found = gradients(module, step)
        for name, parameter in module.named_parameters():
            parameter.grad = torch.tensor(found[name])
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()


def torch_optimizer(variant: Variant, module: torch.nn.Module) -> torch.optim.Optimizer:
    """Variants without groups know the names of their parameters."""
    named = list(module.named_parameters())
    if not variant.groups:
        return variant.theirs(named, lr=RATE)
    parts = [p for n, p in named if "bias" in n], [p for n, p in named if "bias" not in n]
    groups = [{"params": parts[0], "weight_decay": 0.0}, {"params": parts[1]}]
    return variant.theirs(groups, lr=RATE)


def names_of(variant: Variant, module: torch.nn.Module) -> list[list[str]] | None:
    names = [name for name, _ in module.named_parameters()]
    parts = [n for n in names if "bias" in n], [n for n in names if "bias" not in n]
    return [*parts] if variant.groups else None


class Moved(NamedTuple):
    """A variant's torch side where it is left and at the end, and what JAX takes from it."""

    module: torch.nn.Module
    state: StateDict
    end: Tensors
    state_at_end: Tensors
    model: Wide
    tx: optax.GradientTransformation
    taken: object


def leave(variant: Variant) -> Moved:
    module = wide_twin()
    optimizer = torch_optimizer(variant, module)
    take(optimizer, module, range(OUT))
    there, state = copy.deepcopy((module, optimizer.state_dict()))
    take(optimizer, module, range(OUT, END))
    model = nnx.clone(wide())
    interop.load_state_dict(model, there.state_dict())
    tx = variant.ours(model)
    fresh = tx.init(nnx.as_pure(nnx.state(model, nnx.Param)))
    taken = interop.load_optimizer_state_dict(
        fresh, model, state, names=names_of(variant, there), count=OUT
    )
    assert jax.tree.structure(taken) == jax.tree.structure(fresh)
    kinds = [(a.shape, a.dtype) for a in jax.tree.leaves(fresh)]
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(taken)] == kinds
    return Moved(there, state, arrays_of(module), state_of(optimizer), model, tx, taken)


@pytest.fixture(scope="module")
def moved() -> Iterator[dict[str, tuple[Moved, object, object]]]:
    """Every variant, with its parameters and state after some steps in JAX: one program."""
    with jax.enable_x64(True):
        variants = {name: leave(variant) for name, variant in VARIANTS.items()}
        first = next(iter(variants.values()))
        steps = [as_state(first.model, gradients(first.module, i)) for i in range(OUT, IN)]

        def step(carried: dict[str, tuple[object, ...]], gradient: object) -> tuple[object, None]:
            found = {}
            for name, (params, state) in carried.items():
                updates, after = variants[name].tx.update(gradient, state, params)
                found[name] = optax.apply_updates(params, updates), after
            return found, None

        starts = {
            name: (nnx.as_pure(nnx.state(m.model, nnx.Param)), m.taken)
            for name, m in variants.items()
        }
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *steps)
        found, _ = jax.jit(lambda start: jax.lax.scan(step, start, stacked))(starts)
        yield {name: (m, *found[name]) for name, m in variants.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_optimizer_goes_on_in_jax_and_in_torch(
    name: str, moved: dict[str, tuple[Moved, object, object]]
) -> None:
    there, params, state = moved[name]
    variant = VARIANTS[name]
    nnx.update(there.model, params)
    back = wide_twin()
    back.load_state_dict(interop.to_tensors(interop.state_dict(there.model)))
    again = torch_optimizer(variant, back)
    taken = interop.optimizer_state_dict(
        state,
        there.model,
        param_groups=again.state_dict()["param_groups"],
        names=names_of(variant, back),
    )
    again.load_state_dict(interop.to_tensors(taken))
    take(again, back, range(IN, END))
    assert_same_after(END, arrays_of(back), there.end)
    assert_same_after(END, state_of(again), there.state_at_end)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_state_that_only_passes_through_keeps_every_bit(
    name: str, moved: dict[str, tuple[Moved, object, object]]
) -> None:
    there, variant = moved[name][0], VARIANTS[name]
    found = interop.optimizer_state_dict(
        there.taken,
        there.model,
        param_groups=there.state["param_groups"],
        names=names_of(variant, there.module),
    )
    assert found["param_groups"] == there.state["param_groups"]
    assert found["state"].keys() == there.state["state"].keys()
    for i, entry in there.state["state"].items():
        kept = {key: value for key, value in entry.items() if value is not None}
        assert found["state"][i].keys() == kept.keys()
        for key, value in kept.items():
            assert np.array_equal(found["state"][i][key], value.numpy())
            assert found["state"][i][key].dtype == value.numpy().dtype


def counts_in(state: object) -> set[int]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {int(a) for path, a in leaves if str(path[-1]) == ".count"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_count_of_steps_and_schedules_is_loaded(
    name: str, moved: dict[str, tuple[Moved, object, object]]
) -> None:
    assert counts_in(moved[name][0].taken) == {OUT}
