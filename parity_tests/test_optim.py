"""``flaxstab.optim.adamw`` against ``torch.optim.AdamW``, step by step."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flaxstab import optim, parity
from parity_tests.support.cases import values

PARAMETERS = tuple(values(*shape, seed=i) for i, shape in enumerate([(5, 4), (4,), ()]))
OPTIONS = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay, "betas": betas, "eps": eps}
    for amsgrad, maximize, decay, betas, eps in itertools.product(
        (False, True), (False, True), (0.0, 0.05), ((0.9, 0.999), (0.0, 0.99), (0.8, 0.0)),
        (1e-8, 0.3),
    )
]  # fmt: skip


def parameters() -> dict[str, np.ndarray]:
    return dict(zip(("kernel", "bias", "gain"), PARAMETERS, strict=True))


def against_torch(
    tx: optax.GradientTransformation, dtypes: tuple[object, ...] = (), **options: object
) -> parity.Report:
    return parity.compare(
        tx, lambda ps: torch.optim.AdamW(ps, **options), *PARAMETERS, dtypes=dtypes
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_adamw_is_torchs_in_every_step(options: dict[str, object]) -> None:
    """Updates, parameters, moments and counts; in float64 and as accurate in float32."""
    report = against_torch(optim.adamw(0.02, **options), (np.float32,), lr=0.02, **options)
    assert report.passed, str(report)
    assert {"update 2", "exp_avg 1", "exp_avg_sq 0", "step 0"} <= {f.name for f in report.findings}
    assert not report.notes


def test_adamw_has_torchs_defaults() -> None:
    report = against_torch(optim.adamw(), (np.float32, jnp.bfloat16, jnp.float16))
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "planted",
    [
        optax.adamw(0.02),
        optax.chain(optax.add_decayed_weights(1e-2), optax.adam(0.02)),
        optax.adamw(0.02, weight_decay=1e-2, eps_root=1e-8),
    ],
    ids=["decay 1e-4", "L2", "eps in the root"],
)
def test_the_comparison_finds_planted_optimizers(planted: optax.GradientTransformation) -> None:
    report = against_torch(planted, lr=0.02)
    assert report.verdict == parity.Verdict.SEMANTICS_DIFFER
    assert report.departure.step == 1


def test_optax_amsgrad_is_not_torchs() -> None:
    report = against_torch(optax.amsgrad(0.02), lr=0.02, weight_decay=0.0, amsgrad=True)
    assert report.departure.name.startswith("max_exp_avg_sq")


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


def test_a_chain_of_clipping_and_a_scheduled_adamw_is_torchs() -> None:
    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer, steps = torch.optim.AdamW(params), itertools.count()

        def before(*_: object) -> None:
            optimizer.param_groups[0]["lr"] = 0.02 * next(steps)
            torch.nn.utils.clip_grad_norm_(params, 1.0)

        optimizer.register_step_pre_hook(before)
        return optimizer

    adamw = optim.adamw(lambda count: 0.02 * jnp.asarray(count, float))
    report = parity.compare(optax.chain(optim.clip_grad_norm(1.0), adamw), make, *PARAMETERS)
    assert report.passed, str(report)


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
