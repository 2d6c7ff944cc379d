"""``flaxstab.optim``'s ``adamw``, ``adam`` and ``sgd`` against ``torch.optim``, step by step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flaxstab import optim
from parity_tests.support import optimizers
from parity_tests.support.cases import values
from parity_tests.support.optimizers import CASES, Trace

PARAMETERS = tuple(values(*shape, seed=i) for i, shape in enumerate(optimizers.SHAPES.values()))
IDS = ["-".join([c.ours.__name__, *map(str, c.options.values())]) for c in CASES]
every_case = pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)


def parameters() -> dict[str, np.ndarray]:
    return dict(zip(optimizers.SHAPES, PARAMETERS, strict=True))


@functools.cache
def in_float64() -> list[tuple[Trace, Trace]]:
    """Every case on both sides, where one tensor never has a gradient."""
    params, gradients = optimizers.problem()
    gradients |= {"gain": None}
    theirs = [optimizers.run_torch(case.twin, params, gradients) for case in CASES]
    with jax.enable_x64(True):
        ours = optimizers.run_ours([case.make(own_steps=True) for case in CASES], params, gradients)
    return list(zip(ours, theirs, strict=True))


@functools.cache
def in_float32() -> list[tuple[Trace, Trace, Trace]]:
    """Every case in float32 on both sides, and PyTorch's in float64."""
    wide = optimizers.problem("float32")
    low = [{name: a.astype("float32") for name, a in tree.items()} for tree in wide]
    ours = optimizers.run_ours([case.make() for case in CASES], *low)
    theirs = [[optimizers.run_torch(case.twin, *given) for case in CASES] for given in (low, wide)]
    return list(zip(ours, *theirs, strict=True))


def test_the_table_has_every_combination_that_torch_takes() -> None:
    names = [case.ours.__name__ for case in CASES]
    # 3 flags and 3 pairs of betas and eps; 32 of which PyTorch refuses those with nesterov and
    # no momentum (8) or dampening (4).
    assert [names.count(name) for name in ("adamw", "adam", "sgd")] == [24, 24, 20]
    assert len(set(IDS)) == len(IDS)


@every_case
def test_every_tensor_is_torchs_in_every_step(number: int) -> None:
    """Parameters, updates, moments and step counts to 1e-12, one tensor without gradient."""
    ours, theirs = in_float64()[number]
    assert optimizers.differences(ours, theirs) == []
    kinds = {name.split()[0] for name in theirs} - {"param", "update"}
    options = CASES[number].options
    if "betas" in options:
        assert kinds == {"mu", "nu", "step"} | ({"nu_max"} if options["amsgrad"] else set())
    else:
        assert kinds == ({"trace"} if options["momentum"] else set())
    # What has no gradient stays bit for bit, and PyTorch keeps no state of it.
    assert not ours["update gain"].any()
    assert (ours["param gain"] == ours["param gain"][0]).all()
    assert not any(a.any() for n, a in ours.items() if n in ("mu gain", "nu gain", "trace gain"))
    assert not ours["step gain"].any()


@every_case
def test_float32_is_as_accurate_as_torchs(number: int) -> None:
    assert optimizers.worse_than_torch(*in_float32()[number]) == {}


def test_what_is_kept_in_bfloat16_is_less_accurate_than_torchs() -> None:
    for ours, theirs, exact in (in_float32()[0], in_float32()[-1]):
        kind = "mu" if "mu kernel" in ours else "trace"
        rounded = {
            name: a.astype(jnp.bfloat16).astype(a.dtype) if name.startswith(kind) else a
            for name, a in ours.items()
        }
        assert optimizers.worse_than_torch(rounded, theirs, exact).keys() == {kind}


PLAIN, DECAYED, AMSGRAD, MOMENTUM, DAMPENED = 0, 3, 12, 56, 64
WRONG = {  # a case of PyTorch's, an optimizer that is not it, the quantities that give it away
    "decays": (
        PLAIN,
        lambda rate: optim.adamw(rate, weight_decay=0.05, own_steps=True),
        {"update", "param"},
    ),
    "L2": (DECAYED, lambda rate: optim.adam(rate, weight_decay=0.05, own_steps=True), {"mu", "nu"}),
    "climbs": (PLAIN, lambda rate: optim.adam(rate, maximize=True, own_steps=True), {"mu"}),
    "eps": (PLAIN, lambda rate: optim.adam(rate, eps=1.1e-8, own_steps=True), {"update"}),
    "beta": (PLAIN, lambda rate: optim.adam(rate, (0.9, 0.9991), own_steps=True), {"nu"}),
    "no maximum": (AMSGRAD, lambda rate: optim.adam(rate, own_steps=True), {"update"}),
    "momentum": (MOMENTUM, lambda rate: optim.sgd(rate, 0.91, own_steps=True), {"trace"}),
    "no dampening": (DAMPENED, lambda rate: optim.sgd(rate, 0.9, own_steps=True), {"trace"}),
    "nesterov": (
        MOMENTUM,
        lambda rate: optim.sgd(rate, 0.9, nesterov=True, own_steps=True),
        {"update"},
    ),
}


def test_the_comparison_finds_other_optimizers() -> None:
    params, gradients = optimizers.problem()
    made = [make(optimizers.RATE) for _, make, _ in WRONG.values()]
    with jax.enable_x64(True):
        runs = optimizers.run_ours(made, params, gradients | {"gain": None})
    for (number, _, kinds), ours in zip(WRONG.values(), runs, strict=True):
        _, theirs = in_float64()[number]
        found = optimizers.differences({**theirs, **ours}, theirs)
        assert kinds <= {line.split()[0] for line in found}, IDS[number]


def test_the_defaults_are_torchs() -> None:
    params, gradients = optimizers.problem()
    twins = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    with jax.enable_x64(True):
        runs = optimizers.run_ours([optim.adamw(), optim.adam(), optim.sgd()], params, gradients)
    for ours, twin in zip(runs, twins, strict=True):
        theirs = optimizers.run_torch(twin, params, gradients)
        assert optimizers.differences(ours, theirs) == []
    assert optimizers.differences(runs[0], optimizers.run_torch(twins[1], params, gradients))


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
    gradient = jax.tree.map(lambda a: a[..., None].sum(-1) / 3, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    for name, label in labels.items():
        alone, _ = groups[label].update(gradient, groups[label].init(params), params)
        assert updates[name].tolist() == alone[name].tolist()


def test_the_state_has_optaxs_names() -> None:
    params = {"w": jnp.ones(2)}
    state = optim.adamw(amsgrad=True).init(params)
    assert isinstance(state, optim.AdamState)
    assert optax.tree.get(state, "mu")["w"].tolist() == [0.0, 0.0]
    assert optim.adam().init(params).nu_max is None
    assert optim.sgd().init(params).trace is None
    assert optim.sgd(momentum=0.9).init(params).trace["w"].tolist() == [0.0, 0.0]
    # What optax.tree.map_params is for: shardings of the moments, say.
    shown = optax.tree.map_params(optim.adamw(), lambda _: "moment", optim.adamw().init(params))
    assert (shown.mu, shown.nu) == ({"w": "moment"}, {"w": "moment"})
    assert not isinstance(shown.count, str)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_state_is_kept_in_the_dtype_asked_for(name: str) -> None:
    """A bfloat16 second moment stays at 1 under a decay of 0.999; a float32 one does not."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    options = {"momentum": 0.999} if name == "sgd" else {}
    still = {"w": jnp.zeros(3, jnp.bfloat16)}
    left = {}
    for dtype in (None, jnp.float32):
        tx = getattr(optim, name)(0.0, state_dtype=dtype, **options)
        field = "trace" if name == "sgd" else "nu"
        state = tx.init(params)
        state = state._replace(**{field: jax.tree.map(jnp.ones_like, getattr(state, field))})
        step = jax.jit(lambda s, tx=tx: tx.update(still, s, params))
        for _ in range(20):
            updates, state = step(state)
        assert updates["w"].dtype == jnp.bfloat16
        kept = getattr(state, field)["w"]
        assert kept.dtype == (dtype or jnp.bfloat16)
        left[dtype] = float(kept[0])
    assert left[None] == 1.0
    if name == "adamw":  # optax's mu_dtype leaves the second moment as it is
        assert optax.adamw(0.1, mu_dtype=jnp.float32).init(params)[0].nu["w"].dtype == jnp.bfloat16
    assert abs(left[jnp.float32] - 0.999**20) <= 20 * float(jnp.finfo(jnp.float32).eps)
