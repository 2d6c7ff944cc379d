"""``flaxstab.optim.adamw`` against ``torch.optim.AdamW``, step by step."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flaxstab import optim
from flaxstab.parity._verdict import judge_numerics, judge_semantics
from parity_tests.support.cases import values

STEPS = 30
SHAPES = {"kernel": (5, 4), "bias": (4,), "gain": ()}
MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
OPTIONS = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay, "betas": betas, "eps": eps}
    for amsgrad, maximize, decay, betas, eps in itertools.product(
        (False, True), (False, True), (0.0, 0.05), ((0.9, 0.999), (0.0, 0.99), (0.8, 0.0)),
        (1e-8, 0.3),
    )
]  # fmt: skip

Tree = dict[str, np.ndarray]


class Step(NamedTuple):
    """What an optimizer holds after one step."""

    params: Tree
    updates: Tree
    state: dict[str, Tree]
    count: int


def parameters() -> Tree:
    return {name: values(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def gradients(steps: int = STEPS) -> list[Tree]:
    # Both signs and scales from 0.01 to 100, so that neither eps nor the maximum is idle.
    scales = 10 ** values(steps, seed=7, offset=0.0, scale=0.7)
    return [
        {
            name: values(*shape, seed=100 * t + i, offset=0.2, scale=scales[t])
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for t in range(steps)
    ]


def ours(
    tx: optax.GradientTransformation, dtype: str, steps: int = STEPS, *, jit: bool = False
) -> Iterator[Step]:
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), parameters())
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for gradient in gradients(steps):
        given = jax.tree.map(lambda a: jnp.asarray(a, dtype), gradient)
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
        held = {name: getattr(state, name) for name in MOMENTS if name in state._fields}
        trees = jax.tree.map(np.asarray, (params, updates, held))
        yield Step(*trees, int(state.count))


def theirs(
    dtype: str, steps: int = STEPS, rounded: str = "float64", **options: object
) -> list[Step]:
    kind = getattr(torch, dtype)
    params = {n: torch.tensor(a.astype(rounded)).to(kind) for n, a in parameters().items()}
    optimizer = torch.optim.AdamW(list(params.values()), **options)
    found = []
    for gradient in gradients(steps):
        before = {name: tensor.clone() for name, tensor in params.items()}
        for name, tensor in params.items():
            tensor.grad = torch.tensor(gradient[name].astype(rounded)).to(kind)
        optimizer.step()
        state = {name: optimizer.state[tensor] for name, tensor in params.items()}
        held = {
            name: {n: entry[key].numpy().copy() for n, entry in state.items()}
            for name, key in MOMENTS.items()
            if key in state["kernel"]
        }
        after = {name: tensor.numpy().copy() for name, tensor in params.items()}
        updates = {name: after[name] - before[name].numpy() for name in after}
        found.append(Step(after, updates, held, int(state["kernel"]["step"])))
    return found


def quantities(step: Step) -> dict[str, np.ndarray]:
    trees = {"params": step.params, "updates": step.updates, **step.state}
    return {f"{kind} {name}": a for kind, tree in trees.items() for name, a in tree.items()}


def sizes(steps: list[Step]) -> Mapping[str, float]:
    """The magnitude of each quantity: an update is rounded with the parameter that it changes."""
    runs = [quantities(step) for step in steps]
    largest = {name: max(float(np.max(np.abs(run[name]))) for run in runs) for name in runs[0]}
    both = {name: ("params " + name.split()[1]) for name in largest if name.startswith("updates")}
    return {n: max(size, largest[both.get(n, n)]) for n, size in largest.items()}


def assert_same_run(found: Iterator[Step], expected: list[Step]) -> None:
    magnitudes = sizes(expected)
    for t, (step, reference) in enumerate(zip(found, expected, strict=True), start=1):
        assert step.count == reference.count == t
        given, wanted = quantities(step), quantities(reference)
        assert given.keys() == wanted.keys()
        for name, array in given.items():
            assert array.dtype == wanted[name].dtype
            finding = judge_semantics(name, array, wanted[name], magnitudes[name])
            assert finding.passed, f"step {t}, {name}: {finding.explanation}"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_adamw_is_torchs_in_float64_in_every_step(options: dict[str, object]) -> None:
    with jax.enable_x64(True):
        tx = optim.adamw(0.02, **options)
        assert_same_run(ours(tx, "float64"), theirs("float64", lr=0.02, **options))


def test_adamw_has_torchs_defaults() -> None:
    with jax.enable_x64(True):
        assert_same_run(ours(optim.adamw(), "float64"), theirs("float64"))


def test_adamw_is_torchs_under_jit() -> None:
    with jax.enable_x64(True):
        tx = optim.adamw(0.02, amsgrad=True)
        expected = theirs("float64", lr=0.02, amsgrad=True)
        assert_same_run(ours(tx, "float64", jit=True), expected)


@pytest.mark.parametrize(
    "planted",
    [
        {"tx": optax.adamw(0.02), "why": "decay 1e-4"},
        {"tx": optax.chain(optax.add_decayed_weights(1e-2), optax.adam(0.02)), "why": "L2"},
        {"tx": optax.adamw(0.02, weight_decay=1e-2, eps_root=1e-8), "why": "eps in the root"},
    ],
    ids=lambda planted: planted["why"],
)
def test_the_comparison_finds_planted_optimizers(planted: dict[str, object]) -> None:
    def run() -> Iterator[Step]:
        params = jax.tree.map(jnp.asarray, parameters())
        state = planted["tx"].init(params)
        for t, gradient in enumerate(gradients(), start=1):
            updates, state = planted["tx"].update(
                jax.tree.map(jnp.asarray, gradient), state, params
            )
            params = optax.apply_updates(params, updates)
            yield Step(*jax.tree.map(np.asarray, (params, updates)), expected[t - 1].state, t)

    with jax.enable_x64(True):
        expected = theirs("float64", lr=0.02)
        with pytest.raises(AssertionError, match="differ by"):
            assert_same_run(run(), expected)


def test_optax_amsgrad_is_not_torchs() -> None:
    with jax.enable_x64(True):
        options = {"lr": 0.02, "weight_decay": 0.0, "amsgrad": True}
        expected = theirs("float64", **options)
        params = jax.tree.map(jnp.asarray, parameters())
        tx = optax.amsgrad(0.02)
        state = tx.init(params)
        for gradient in gradients():
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
        size = sizes(expected)["params kernel"]
        last = expected[-1].params["kernel"]
        assert not judge_semantics("kernel", np.asarray(params["kernel"]), last, size).passed


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
def test_adamw_in_float32_is_as_accurate_as_torchs(
    amsgrad: bool, betas: tuple[float, float]
) -> None:
    options = {"lr": 0.02, "weight_decay": 0.05, "amsgrad": amsgrad, "betas": betas}
    tx = optim.adamw(0.02, betas, weight_decay=0.05, amsgrad=amsgrad)
    oracle = theirs("float64", rounded="float32", **options)
    magnitudes = sizes(oracle)
    torchs_run = theirs("float32", rounded="float32", **options)
    runs = zip(ours(tx, "float32"), torchs_run, oracle, strict=True)
    for t, steps in enumerate(runs, start=1):
        mine, torchs, exact = (quantities(step) for step in steps)
        for name, size in magnitudes.items():
            assert mine[name].dtype == np.float32
            finding = judge_numerics(
                name, mine[name], torchs[name], (exact[name],) * 2, size, np.float32
            )
            assert finding.passed, f"step {t}, {name}: {finding.explanation}"


# One update is a quotient of two moments, two corrections, a root, eps and the rate: fewer than 16
# roundings of float32, each half an eps of the update.
UPDATE_BOUND = 16 * float(jnp.finfo(jnp.float32).eps) / 2


def _worst_relative_update(tx: optax.GradientTransformation, steps: int = 20) -> float:
    """How far float32 updates are from a float64 loop, for one parameter and a constant sign."""
    rates, m, v, worst = (np.float64(0.9), np.float64(0.9999)), 0.0, 0.0, 0.0
    params = {"kernel": jnp.zeros(())}
    state = tx.init(params)
    for t in range(1, steps + 1):
        g = np.float32(3 + t / 16)
        m = rates[0] * m + (1 - rates[0]) * float(g)
        v = rates[1] * v + (1 - rates[1]) * float(g) ** 2
        exact = -0.1 * (m / (1 - rates[0] ** t)) / math.sqrt(v / (1 - rates[1] ** t))
        updates, state = tx.update({"kernel": jnp.asarray(g)}, state, params)
        worst = max(worst, abs(float(updates["kernel"]) / exact - 1))
    return worst


def test_bias_correction_does_not_cancel() -> None:
    assert _worst_relative_update(optim.adamw(0.1, (0.9, 0.9999), weight_decay=0.0)) < UPDATE_BOUND
    # optax's own takes 1 - b2**t in float32.
    assert _worst_relative_update(optax.adam(0.1, 0.9, 0.9999)) > 10 * UPDATE_BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_moments_keep_the_dtype_and_are_rounded_once(dtype: str) -> None:
    params = {"kernel": jnp.asarray(values(6), dtype)}
    gradient = {"kernel": jnp.asarray(values(6, seed=1, offset=0.3), dtype)}
    tx = optim.adamw(0.02, weight_decay=0.05)
    updates, state = tx.update(gradient, tx.init(params), params)
    p, g = (np.asarray(tree["kernel"], np.float64) for tree in (params, gradient))
    direction = g / (np.abs(g) + 1e-8)  # both corrections undo the first average exactly
    exact = {"update": -0.02 * direction - 0.02 * 0.05 * p, "mu": 0.1 * g, "nu": 1e-3 * g**2}
    given = {"update": updates, "mu": state.mu, "nu": state.nu}
    for name, tree in given.items():
        assert tree["kernel"].dtype == jnp.dtype(dtype)
        error = np.abs(np.asarray(tree["kernel"], np.float64) - exact[name])
        # half an eps of the dtype, and as much again where the number is below its power of two
        bound = float(jnp.finfo(dtype).eps) * np.abs(exact[name])
        assert np.all(error <= bound + float(jnp.finfo(dtype).smallest_subnormal)), name


def test_maximize_climbs_and_still_decays_towards_zero() -> None:
    params, gradient = {"w": jnp.array([2.0])}, {"w": jnp.array([5.0])}
    updates = {}
    for decay in (0.0, 0.5):
        tx = optim.adamw(0.1, weight_decay=decay, maximize=True)
        updates[decay], _ = tx.update(gradient, tx.init(params), params)
    assert float(updates[0.0]["w"][0]) > 0
    assert float(updates[0.5]["w"][0]) < float(updates[0.0]["w"][0])


def test_only_masked_parameters_decay() -> None:
    mask = {"kernel": True, "bias": False, "gain": np.False_}
    params = jax.tree.map(jnp.asarray, parameters())
    still = jax.tree.map(jnp.zeros_like, params)
    for given in (mask, lambda tree: {name: mask[name] for name in tree}):
        tx = optim.adamw(0.5, weight_decay=0.5, mask=given)
        updates, _ = tx.update(still, tx.init(params), params)
        assert updates["kernel"].tolist() == (-0.25 * params["kernel"]).tolist()
        assert not updates["bias"].any()
        assert not updates["gain"].any()


def test_a_chain_of_clipping_and_adamw_is_torchs() -> None:
    rates = [0.02 * t for t in range(3)]
    with jax.enable_x64(True):
        tx = optax.chain(
            optim.clip_grad_norm(1.0), optim.adamw(lambda count: 0.02 * jnp.asarray(count, float))
        )
        params = jax.tree.map(jnp.asarray, parameters())
        state = tx.init(params)
        twins = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in parameters().items()}
        optimizer = torch.optim.AdamW(list(twins.values()))
        for rate, gradient in zip(rates, gradients(3), strict=True):
            updates, state = tx.update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
            optimizer.param_groups[0]["lr"] = rate
            for name, twin in twins.items():
                twin.grad = torch.tensor(gradient[name])
            torch.nn.utils.clip_grad_norm_(list(twins.values()), 1.0)
            optimizer.step()
        for name, twin in twins.items():
            expected = twin.detach().numpy()
            size = float(np.max(np.abs(expected)))
            assert judge_semantics(name, np.asarray(params[name]), expected, size).passed


def test_a_tree_without_parameters_is_no_error() -> None:
    # optax.partition gives such trees to groups that nothing belongs to.
    for amsgrad in (False, True):
        tx = optim.adamw(0.1, amsgrad=amsgrad)
        updates, state = tx.update({}, tx.init({}), {})
        assert updates == {}
        assert int(state.count) == 1


def test_partition_trains_each_group_with_its_own_rate() -> None:
    params = jax.tree.map(jnp.asarray, parameters())
    groups = {"slow": optim.adamw(0.01), "fast": optim.adamw(0.1), "empty": optim.adamw()}
    labels = {"kernel": "slow", "bias": "fast", "gain": "slow"}
    tx = optax.partition(groups, labels)
    gradient = jax.tree.map(jnp.asarray, gradients(1)[0])
    updates, _ = tx.update(gradient, tx.init(params), params)
    for name, label in labels.items():
        alone, _ = groups[label].update(gradient, groups[label].init(params), params)
        assert updates[name].tolist() == alone[name].tolist()


@pytest.mark.parametrize("mask", [True, False, np.True_, jnp.array(True), np.array([True, False])])
def test_a_bare_boolean_mask_is_refused(mask: object) -> None:
    with pytest.raises(
        ValueError, match=r"mask must be .*, not a bare boolean, got mask=.*static_"
    ):
        optim.adamw(mask=mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"learning_rate": -1.0},
            "learning_rate, eps and weight_decay must .* got learning_rate=-1",
        ),
        ({"learning_rate": jnp.float32(-1)}, "must be finite and at least 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"betas": (1.0, 0.999)}, r"betas must lie in \[0, 1\), got betas=\(1.0, 0.999\)"),
        ({"betas": (0.9, -0.1)}, r"betas must lie in \[0, 1\)"),
        ({"betas": (0.9, math.nan)}, r"betas must lie in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas must be two decay rates, got betas=\(0.9,\)"),
    ],
)
def test_known_bad_values_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.adamw(**arguments)


def test_a_mask_that_does_not_fit_is_refused_at_init() -> None:
    with pytest.raises(
        ValueError, match=r"at the parameter's place, got on_one_side_only=\['bias', 'gain'\]"
    ):
        optim.adamw(mask={"kernel": True}).init(parameters())


def test_a_mask_goes_by_names_and_not_by_order() -> None:
    params = {0: jnp.ones(1), 2: jnp.ones(1), 10: jnp.ones(1)}
    tx = optim.adamw(1.0, weight_decay=0.5, mask={"0": False, "2": False, "10": True})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {k: float(u[0]) for k, u in updates.items()} == {0: 0.0, 2: 0.0, 10: -0.5}


def test_an_update_without_parameters_is_refused() -> None:
    tx = optim.adamw()
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="weight decay needs the parameters, got params=None"):
        tx.update(params, tx.init(params))


def test_the_state_is_optaxs_own() -> None:
    assert isinstance(optim.adamw().init({"w": jnp.ones(2)}), optax.ScaleByAdamState)
    state = optim.adamw(amsgrad=True).init({"w": jnp.ones(2)})
    assert isinstance(state, optax.ScaleByAmsgradState)
