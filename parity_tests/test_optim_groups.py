"""Frozen parameters, groups with options of their own, and layer-wise learning-rate decay."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import linear, norms, optim
from parity_tests.support import optimizers

GROUPS = {"kernel": {"lr": 0.1, "weight_decay": 0.3}, "bias": {"weight_decay": 0.0}, "gain": {}}


class Net(nnx.Module):
    """The three tensors of the problem as a model."""

    def __init__(self) -> None:
        for name, a in optimizers.problem()[0].items():
            setattr(self, name, nnx.Param(jnp.asarray(a)))


def rules() -> list[dict[str, object]]:
    return [
        {"params": nnx.PathContains("kernel"), "learning_rate": 0.1, "weight_decay": 0.3},
        {"params": nnx.PathContains("bias"), "weight_decay": 0.0, "name": "no decay"},
    ]


def test_groups_and_what_is_frozen_are_torchs_in_every_step() -> None:
    params, gradients = optimizers.problem()

    def grouped(tensors: optimizers.Params) -> torch.optim.Optimizer:
        rows = zip([GROUPS[name] for name in params], tensors, strict=True)
        return torch.optim.AdamW([{"params": [p], **o} for o, p in rows], lr=0.02, foreach=False)

    def unfrozen(tensors: optimizers.Params) -> torch.optim.Optimizer:
        others = [p for name, p in zip(params, tensors, strict=True) if name != "kernel"]
        return torch.optim.SGD(others, lr=0.02, momentum=0.9, weight_decay=0.1)

    with jax.enable_x64(True):
        groups = optim.param_groups(Net(), rules())
        tx = groups.optimizer(optim.adamw, learning_rate=0.02)
        frozen = optim.select(Net(), nnx.PathContains("kernel"))
        sgd = optim.freeze(optim.sgd(0.02, 0.9, weight_decay=0.1), frozen)
        ours = run([tx, sgd], params, gradients)
    for found, make in zip(ours, (grouped, unfrozen), strict=True):
        theirs = optimizers.run_torch(make, params, gradients)
        theirs = {n: a for n, a in theirs.items() if n.split()[0] in ("param", "update")}
        assert optimizers.differences(found, theirs) == []
    assert not ours[1]["update kernel"].any()


def run(
    txs: list[optax.GradientTransformation], params: optimizers.Tree, gradients: optimizers.Tree
) -> list[optimizers.Trace]:
    """Runs optimizers whose states have other forms; only parameters and updates are noted."""
    given = jax.tree.map(jnp.asarray, params)

    def step(carried: list[object], gradient: object) -> tuple[object, object]:
        rows = zip(txs, carried, strict=True)
        found = [(p, *tx.update(gradient, state, p)) for tx, (p, state) in rows]
        after = [(optax.apply_updates(p, u), state) for p, u, state in found]
        return after, [(p, u) for (p, _), (_, u, _) in zip(after, found, strict=True)]

    starts = [(given, tx.init(given)) for tx in txs]
    _, found = jax.jit(lambda start: jax.lax.scan(step, start, gradients))(starts)
    return [
        {f"{kind} {n}": np.asarray(a) for kind, tree in named.items() for n, a in tree.items()}
        for named in ({"param": p, "update": u} for p, u in found)
    ]


@pytest.mark.parametrize("injected", [False, True])
def test_groups_with_a_mask_work_in_nnx_optimizer(injected: bool) -> None:
    model = Net()
    make = optim.sgd
    if injected:
        make = optax.inject_hyperparams(optim.sgd, static_args=("mask",))
    groups = optim.param_groups(model, [{"params": nnx.PathContains("gain"), "weight_decay": 0.5}])
    tx = groups.optimizer(make, learning_rate=0.5, weight_decay=1.0, mask=optim.decay_mask(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))

    if injected:
        rest = optimizer.opt_state.inner_states["rest"].inner_state
        rest.hyperparams["weight_decay"][...] = jnp.float32(0.25)
    step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    kept = {"kernel": 0.875 if injected else 0.5, "gain": 0.75, "bias": 1.0}
    for name, factor in kept.items():
        np.testing.assert_array_equal(after[name], factor * before[name])


def test_groups_are_printed_and_label_every_form_of_the_tree() -> None:
    model = Net()
    groups = optim.param_groups(model, rules())
    assert [line.split()[:2] for line in str(groups).splitlines()] == [
        ["parameter", "group"], ["bias", "no"], ["gain", "rest"], ["kernel", "group"],
    ]  # fmt: skip
    assert "learning_rate=0.1, weight_decay=0.3" in str(groups)
    state = nnx.state(model, nnx.Param)
    labels = {"kernel": "group 0", "bias": "no decay", "gain": "rest"}
    assert groups(nnx.to_pure_dict(state)) == labels
    assert jax.tree.structure(groups(state)) == jax.tree.structure(state)
    with pytest.raises(ValueError, match=r"got leaf='other'. Known parameters: bias, gain, kernel"):
        groups({"other": jnp.ones(1)})


def test_the_first_rule_that_takes_a_parameter_has_it() -> None:
    groups = optim.param_groups(
        Net(), [{"params": nnx.PathContains("bias")}, {"params": ..., "learning_rate": 1.0}]
    )
    assert groups.groups == {("bias",): "group 0", ("gain",): "group 1", ("kernel",): "group 1"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"params": nnx.PathContains("haed")}], "a filter must take a parameter .*haed"),
        (
            [{"params": nnx.Param}, {"params": nnx.PathContains("bias")}],
            "that none before it takes",
        ),
        ([{"learning_rate": 0.1}], "a group must say whose it is, got group="),
        ([{"params": ..., "name": "rest"}], "groups must have names of their own, and 'rest'"),
        (
            [{"params": nnx.PathContains(n), "name": "a"} for n in ("bias", "gain")],
            r"names of their own, .*got names=\['a', 'a'\]",
        ),
    ],
)
def test_bad_rules_are_refused(given: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.param_groups(Net(), given)


def test_an_option_that_the_optimizer_does_not_take_is_named() -> None:
    groups = optim.param_groups(Net(), [{"params": nnx.PathContains("bias"), "lr": 0.1}])
    with pytest.raises(ValueError, match=r"'group 0' must set arguments .*\['lr'\]. It takes lear"):
        groups.optimizer(optim.adamw)


class Deep(nnx.Module):
    """A stem, two blocks and a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([linear.Linear(3, 3, bias=False, rngs=rngs) for _ in range(2)])
        self.cls = nnx.Param(jnp.ones((1, 3)), role="class token")
        self.head = linear.Linear(3, 2, bias=False, rngs=rngs)
        self.norm = norms.LayerNorm(3, bias=False)
        self.patch_embed = linear.Linear(4, 3, bias=False, rngs=rngs)


DEPTHS = {"blocks.0.kernel": 1, "blocks.1.kernel": 2, "cls": 0, "head.kernel": 3, "norm.scale": 3,
          "patch_embed.kernel": 0}  # fmt: skip


@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["nnx.jit", "eager"])
def test_layer_decay_inside_nnx_optimizer_is_beits(jit: Callable[..., object]) -> None:
    """One step of SGD on gradients of 1, decay included, moves each layer by its rate."""
    model = Deep(nnx.Rngs(0))
    factors = optim.layer_decay(
        model, 0.5, blocks="blocks", stem=(nnx.PathContains("patch_embed"),)
    )
    tx = optax.chain(optim.sgd(0.25, weight_decay=1.0), optim.scale_updates(factors))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))

    @jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))

    step(model, optimizer)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    moved = {".".join(map(str, path)): 1 - np.unique(v[...]) for path, v in flat}
    # BEiT: 2 blocks, so layers 0 to 3, and layer i learns at 0.5 ** (3 - i).
    assert moved == {name: [0.5 * 0.5 ** (3 - depth)] for name, depth in DEPTHS.items()}
    rows = {line.split()[0]: line.split()[-2:] for line in str(factors).splitlines()[1:]}
    assert rows == {n: [str(d), f"{0.5 ** (3 - d):.4g}"] for n, d in DEPTHS.items()}


def test_layer_decay_of_a_stack_is_that_of_its_layers() -> None:
    class Stacked(nnx.Module):
        def __init__(self) -> None:
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> nnx.Module:
                return linear.Linear(3, 3, rngs=rngs)

            self.encoder = nnx.Dict(layers=make(nnx.Rngs(0).split(2)))
            self.head = linear.Linear(3, 2, rngs=nnx.Rngs(0))

    model = Stacked()
    factors = optim.layer_decay(model, 0.5, blocks="encoder.layers")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = factors(params)
    assert found["encoder"]["layers"]["kernel"].tolist() == [[[0.25]], [[0.5]]]
    assert found["encoder"]["layers"]["bias"].tolist() == [[0.25], [0.5]]
    assert float(found["head"]["kernel"]) == 1.0
    ones = jax.tree.map(jnp.ones_like, params)
    scaled, _ = optim.scale_updates(factors).update(ones, optax.EmptyState())
    assert scaled["encoder"]["layers"]["kernel"][:, 0, 0].tolist() == [0.25, 0.5]
    assert "1 to 2  0.25 to 0.5" in str(factors)


@pytest.mark.parametrize(
    ("decay", "blocks", "message"),
    [
        (0.0, "blocks", "decay must be finite and above 0, got decay=0.0"),
        (math.inf, "blocks", "decay must be finite and above 0, got decay=inf"),
        ("0.5", "blocks", "decay must be a number"),
        (0.5, "layers", "blocks must be the path of the model's blocks, got blocks='layers'"),
        (0.5, "head", r"stacked along the first axis, .*lengths=\[\(2,\), \(3,\)\]"),
    ],
)
def test_bad_arguments_of_layer_decay_are_refused(decay: float, blocks: str, message: str) -> None:
    model = Deep(nnx.Rngs(0))
    model.head = linear.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        optim.layer_decay(model, decay, blocks=blocks)


def test_factors_that_do_not_fit_are_named() -> None:
    updates = {"a": jnp.ones(1), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"factors must have one number per .*=\['b'\]"):
        optim.scale_updates({"a": 1.0}).update(updates, optax.EmptyState())


@pytest.mark.parametrize("tx", [optim.adamw(0.1), optax.adamw(0.1)], ids=["ours", "optax"])
@pytest.mark.parametrize("form", ["state", "tree"])
def test_frozen_parameters_have_no_moments_in_nnx_optimizer(tx: object, form: str) -> None:
    model = Deep(nnx.Rngs(0))
    mask = optim.select(model, nnx.PathContains("blocks"), nnx.PathContains("cls"))
    given = mask if form == "state" else nnx.to_pure_dict(mask(nnx.state(model, nnx.Param)))
    frozen = optim.freeze(optax.chain(optim.clip_grad_norm(1.0), tx), given)
    optimizer = nnx.Optimizer(model, frozen, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))

    for _ in range(2):
        step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), before, after)
    still = jax.tree.map(lambda flag: not flag, moved)
    assert still == mask(before)
    mu = optax.tree.get(nnx.as_pure(optimizer.opt_state), "mu")
    assert len(jax.tree.leaves(mu)) == 3
    # 3 * 2 + 3 + 4 * 3 elements are trained: the frozen do not count in the norm, as in PyTorch.
    norm = float(optimizer.opt_state[0].norm[...])
    assert abs(norm - 21**0.5) <= 4 * float(jnp.finfo(jnp.float32).eps) * norm


def test_a_wrong_freeze_mask_is_refused_with_the_leaf() -> None:
    with pytest.raises(ValueError, match=r"got on_one_side_only=\['b'\]"):
        optim.freeze(optax.sgd(0.1), {"a": True}).init({"a": jnp.ones(1), "b": jnp.ones(1)})


@pytest.mark.parametrize("own", [False, True])
def test_a_parameter_that_is_unfrozen_begins_as_torchs(own: bool) -> None:
    """Three steps without the backbone, then three with it."""
    params, rng = {"backbone": np.ones(3), "head": np.ones(2)}, np.random.default_rng(0)
    steps = [{n: rng.normal(size=p.shape) for n, p in params.items()} for _ in range(6)]
    tensors = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in params.items()}
    theirs = torch.optim.AdamW(tensors.values(), lr=0.1)
    for i, step in enumerate(steps):
        for name, tensor in tensors.items():
            held = i < 3 and name == "backbone"
            tensor.grad = None if held else torch.tensor(step[name])
        theirs.step()
    with jax.enable_x64(True):
        ours = {name: jnp.asarray(p) for name, p in params.items()}
        tx = optax.chain(optim.clip_grad_norm(1e9), optim.adamw(0.1, own_steps=own))
        frozen = optim.freeze(tx, {"backbone": True, "head": False})
        state = frozen.init(ours)
        for i, step in enumerate(steps):
            if i == 3:
                with pytest.raises(ValueError, match=r"only=\['backbone'\].*optim.thaw"):
                    tx.update(ours, state, ours)
                state = optim.thaw(tx, state, ours)
                assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(ours))
            updates, state = (frozen if i < 3 else tx).update(step, state, ours)
            ours = optax.apply_updates(ours, updates)
        # 1e-12 of its size a step, as everywhere in float64.
        bound = len(steps) * 1e-12
        near = {n: np.allclose(ours[n], t.detach(), rtol=bound, atol=0) for n, t in tensors.items()}
    assert near == {"backbone": own, "head": True}


def test_thaw_refuses_the_state_of_another_optimizer() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    adam, sgd = optim.adamw(0.1), optim.sgd(0.1, 0.9)
    with pytest.raises(ValueError, match="the states must be of the same kinds"):
        optim.thaw(adam, sgd.init(params), params)
    with pytest.raises(ValueError, match=r"in their shapes, got odd=\['b'\]"):
        optim.thaw(adam, adam.init(params), {"a": jnp.ones(2)})


def test_layer_decay_refuses_a_place_above_the_list_of_blocks() -> None:
    """Blocks of one shape look as a stack does."""

    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.blocks = nnx.Sequential(*[nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])

    with pytest.raises(ValueError, match=r"must be the list itself, .*listed=\['layers.0.bias'"):
        optim.layer_decay(Net(), 0.5, blocks="blocks")
    found = optim.layer_decay(Net(), 0.5, blocks="blocks.layers").depths
    assert found[("blocks", "layers", "1", "kernel")].depths == (2,)
