"""The parts of ``flaxstab.parity``: verdicts, magnitude, distances, replayed dropout."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import linear, norms, optim, parity
from flaxstab.parity import Verdict
from flaxstab.parity._magnitude import UNIT
from flaxstab.parity._verdict import SEMANTICS, judge_numerics, judge_semantics
from parity_tests.support.cases import values

ONE = np.ones(3)
EPS = float(jnp.finfo(jnp.float32).eps)


def test_semantics_must_agree_to_1e_12_of_the_magnitude() -> None:
    assert float("1e-12") == SEMANTICS  # DESIGN, "How parity is judged", 1
    for size in (1.0, 1e6):
        near = judge_semantics("q", ONE + 0.9 * SEMANTICS * size, ONE, size)
        far = judge_semantics("q", ONE - 1.1 * SEMANTICS * size, ONE, size)
        assert (near.verdict, near.passed) == (Verdict.AGREE, True)
        assert (far.verdict, far.passed) == (Verdict.SEMANTICS_DIFFER, False)
        assert far.explanation.startswith("the sides differ by 1.1e-12 of the magnitude")
        assert (far.name, far.dtype) == ("q", "float64")


def test_a_bound_10_times_looser_misses_what_the_bound_finds() -> None:
    fault = judge_semantics("q", ONE + 5 * SEMANTICS, ONE, 1.0)
    assert not fault.passed
    assert judge_semantics("q", ONE + 5 * SEMANTICS, ONE, 10.0).passed


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (ONE[:2], ONE, r"the shapes differ: \(2,\) and \(3,\)"),
        (ONE[None], ONE, "the shapes differ"),
        (np.array([1, np.nan, 1]), ONE, "NaN in different places: 1 and 0"),
        (np.array([1, np.nan, 1]), np.array([np.nan, 1, 1]), "NaN in different places: 1 and 1"),
        (np.array([1, np.inf, 1]), ONE, "infinities in different places"),
        (np.array([1, np.inf, 1]), np.array([1, -np.inf, 1]), "infinities in different places"),
    ],
)
def test_shapes_and_places_of_nan_and_infinity_must_agree(
    ours: np.ndarray, theirs: np.ndarray, message: str
) -> None:
    low = judge_numerics("q", ours, theirs, (theirs, theirs), 1.0, np.float32)
    for finding in (judge_semantics("q", ours, theirs, 1.0), low):
        assert finding.verdict in (Verdict.SEMANTICS_DIFFER, Verdict.JAX_WORSE)
        assert not finding.passed
        assert re.search(message, finding.explanation)


def test_an_overflow_is_the_error_of_the_side_that_has_it() -> None:
    spoiled = np.array([1, np.inf, 1])
    assert (
        judge_numerics("q", ONE, spoiled, (ONE, ONE), 1.0, np.float32).verdict
        == Verdict.TORCH_WORSE
    )
    assert (
        judge_numerics("q", spoiled, ONE, (ONE, ONE), 1.0, np.float32).verdict == Verdict.JAX_WORSE
    )
    assert (
        judge_numerics("q", spoiled, spoiled, (ONE, ONE), 1.0, np.float32).verdict == Verdict.AGREE
    )


def test_nan_and_infinity_in_the_same_places_agree_and_hide_nothing_else() -> None:
    holed = np.array([np.nan, np.inf, 1.0, -np.inf])
    assert judge_semantics("q", holed, holed, 1.0).passed
    other = holed.copy()
    other[2] = 1.5
    assert not judge_semantics("q", other, holed, 1.0).passed
    assert not judge_numerics("q", other, holed, (holed, holed), 1.0, np.float32).passed


def test_a_quantity_of_magnitude_0_must_be_equal() -> None:
    zero = np.zeros(3)
    assert judge_semantics("q", zero, zero, 0.0).passed
    assert not judge_semantics("q", zero + 1e-300, zero, 0.0).passed
    assert judge_numerics("q", zero, zero, (zero, zero), 0.0, np.float32).passed
    assert not judge_numerics("q", zero + 1e-30, zero, (zero, zero), 0.0, np.float32).passed


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (0.0, 0.0, Verdict.AGREE),
        (1.9, 0.0, Verdict.AGREE),
        (2.1, 0.0, Verdict.JAX_WORSE),
        (21.9, 10.0, Verdict.AGREE),
        (22.1, 10.0, Verdict.JAX_WORSE),
        (10.0, 21.9, Verdict.AGREE),
        (10.0, 22.1, Verdict.TORCH_WORSE),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_our_error_may_be_twice_torchs_plus_2_eps(
    ours: float, theirs: float, verdict: Verdict, dtype: object, size: float
) -> None:
    unit = float(jnp.finfo(dtype).eps) * size
    exact = ONE * size
    sides = exact + ours * unit, exact - theirs * unit
    finding = judge_numerics("q", *sides, (exact, exact), size, dtype)
    assert finding.verdict == verdict
    assert finding.passed == (verdict != Verdict.JAX_WORSE)
    assert finding.dtype == np.dtype(dtype).name
    assert "eps of its sensitivity off float64" in finding.explanation


def test_an_unknown_magnitude_never_passes() -> None:
    assert not judge_semantics("q", ONE, ONE, math.nan).passed
    assert not judge_numerics("q", ONE, ONE, (ONE, ONE), math.nan, np.float32).passed


@pytest.mark.parametrize("offset", [1.0, 1e6])
def test_the_magnitude_of_a_sum_whose_terms_cancel_is_that_of_its_terms(offset: float) -> None:
    terms = offset * np.array([1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 3.0, -3.0])
    with jax.enable_x64(True):
        found = parity.magnitude(lambda x: {"sum": x.sum()}, jnp.asarray(terms))["sum"]
    assert terms.sum() == 0
    assert np.abs(terms).max() <= float(found) <= np.abs(terms).sum()


def test_the_magnitude_of_a_dot_product_lies_between_its_largest_and_all_its_terms() -> None:
    a, b = values(50, seed=1, offset=0.0), values(50, seed=2, offset=0.0)
    with jax.enable_x64(True):
        found = parity.magnitude(
            lambda x, y: {"dot": jnp.vdot(x, y)}, jnp.asarray(a), jnp.asarray(b)
        )
    terms = np.abs(a * b)
    assert terms.max() <= float(found["dot"]) <= 2 * terms.sum()  # both factors are perturbed


def test_the_magnitude_fills_each_result_and_is_at_least_its_largest_value() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(values(4, 3))
        found = parity.magnitude(lambda x: {"same": x, "flat": jnp.full((2,), 7.0)}, x)
    assert found["same"].shape == (4, 3)
    assert np.unique(found["same"]).tolist() == [float(np.max(np.abs(np.asarray(x))))]
    assert found["flat"].tolist() == [7.0, 7.0]


def test_nan_and_infinity_do_not_hide_the_magnitude() -> None:
    with jax.enable_x64(True):
        x = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
        assert parity.magnitude(lambda x: {"same": x}, x)["same"].tolist() == [3.0] * 4


def test_the_magnitude_knows_terms_that_cancel_inside_and_the_sensitivity_does_not() -> None:
    """(x + 1e6) - 1e6 is x: its terms are a million times larger than what x moves."""

    def detour(x: jax.Array) -> dict[str, jax.Array]:
        return {"same": (x + 1e6) - 1e6}

    with jax.enable_x64(True):
        x = jnp.asarray(values(5))
        inside, alone = (
            float(f(detour, x)["same"].max()) for f in (parity.magnitude, parity.sensitivity)
        )
        size = float(jnp.max(jnp.abs(x)))
    assert 1e6 <= inside <= 3e6
    noise = float(np.finfo(np.float64).eps) * inside / UNIT  # of the difference of two runs
    assert size - noise <= alone <= size + noise


def test_a_poor_algorithm_has_the_sensitivity_of_a_good_one() -> None:
    def one_pass(x: jax.Array) -> dict[str, jax.Array]:
        return {"var": jnp.mean(x * x) - jnp.mean(x) ** 2}

    def two_pass(x: jax.Array) -> dict[str, jax.Array]:
        return {"var": jnp.mean((x - jnp.mean(x)) ** 2)}

    with jax.enable_x64(True):
        x = jnp.asarray(values(200, offset=1e3, scale=1.0))
        poor, good = (float(parity.sensitivity(f, x)["var"]) for f in (one_pass, two_pass))
        worse, better = (float(parity.magnitude(f, x)["var"]) for f in (one_pass, two_pass))
    noise = float(np.finfo(np.float64).eps) * 1e3**2 / UNIT  # of a difference of runs
    assert abs(poor - good) <= noise
    assert worse > 100 * better


def test_the_magnitude_repeats_with_the_seed() -> None:
    x = jnp.asarray(values(9), "float32")

    def total(seed: int) -> float:
        return float(parity.magnitude(lambda x: {"s": x.sum() - x[0]}, x, seed=seed)["s"])

    assert total(1) == total(1)


def test_distance_names_the_tensor_that_is_furthest_apart() -> None:
    theirs = {"a": np.array([10.0, 1.0]), "b": np.array([2.0])}
    assert parity.distance(theirs, theirs) == parity.Distance(0.0, "")
    ours = {"a": np.array([10.0, 2.0]), "b": np.array([2.5])}
    assert parity.distance(ours, theirs) == parity.Distance(0.25, "b")
    assert parity.distance({"a": np.zeros(2)}, {"a": np.zeros(2)}).value == 0
    assert parity.distance({"a": np.ones(2)}, {"a": np.zeros(2)}).value == math.inf
    assert parity.distance({"a": np.zeros((0, 2))}, {"a": np.zeros((0, 2))}).value == 0


@pytest.mark.parametrize("side", ["ours", "theirs"])
@pytest.mark.parametrize("place", ["a", "b", "c"])
def test_nan_is_the_largest_distance_wherever_it_is(side: str, place: str) -> None:
    sides = {side: {n: np.array([1.0, 2.0]) for n in "abc"} for side in ("ours", "theirs")}
    sides["ours"]["b"][0] = 1.5
    sides[side][place][1] = np.nan
    found = parity.distance(**sides)
    assert math.isnan(found.value)
    assert found.name == place


def test_distance_refuses_other_names_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"the same tensors, got \['a', 'b'\] on one side only"):
        parity.distance({"a": ONE}, {"b": ONE})
    with pytest.raises(ValueError, match=r"equal shapes, got a \(3,\) and \(1, 3\)"):
        parity.distance({"a": ONE}, {"a": ONE[None]})


class Ours(nnx.Module):
    def __init__(self) -> None:
        self.first = linear.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = norms.BatchNorm(4)


class Theirs(torch.nn.Module):
    def __init__(self, ours: Ours) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(np.asarray(ours.first.kernel[...]).T))
            self.first.bias.copy_(torch.tensor(np.asarray(ours.first.bias[...])))


def test_model_distances_are_those_of_parameters_and_of_statistics() -> None:
    ours = Ours()
    theirs = Theirs(ours)
    assert [d.value for d in parity.model_distances(ours, theirs)] == [0, 0]
    ours.norm.var[...] = jnp.array([1.0, 1.5, 1.0, 1.0])
    params, statistics = parity.model_distances(ours, theirs)
    assert params.value == 0
    assert statistics == parity.Distance(0.5, "norm.running_var")
    ours.norm.scale[...] = jnp.array([1.0, 1.0, 1.0, 0.0])
    assert parity.model_distances(ours, theirs)[0] == parity.Distance(1.0, "norm.weight")


def test_model_distances_refuse_models_of_other_names() -> None:
    with pytest.raises(ValueError, match=r"the same tensors, got .*'first.bias'"):
        parity.model_distances(Ours(), torch.nn.Linear(3, 4))


def _stepped(
    *, amsgrad: bool, planted: str = ""
) -> tuple[Ours, optax.OptState, Theirs, torch.optim.AdamW]:
    ours = Ours()
    theirs = Theirs(ours)
    optimizer = torch.optim.AdamW(theirs.parameters(), amsgrad=amsgrad)
    for parameter in theirs.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    params = nnx.state(ours, nnx.Param)
    tx = optax.chain(optax.identity(), optim.adamw(amsgrad=amsgrad))
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    adam = state[1]
    if planted == "count":
        adam = adam._replace(count=adam.count + 1)
    elif planted:
        tree = getattr(adam, planted)
        adam = adam._replace(**{planted: jax.tree.map(lambda leaf: leaf * 2, tree)})
    return ours, (state[0], adam), theirs, optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_distance_is_a_rounding_for_the_same_step(amsgrad: bool) -> None:
    assert parity.adam_distance(*_stepped(amsgrad=amsgrad)).value <= EPS


@pytest.mark.parametrize(
    ("planted", "name"),
    [("mu", "exp_avg "), ("nu", "exp_avg_sq "), ("nu_max", "max_exp_avg_sq "), ("count", "step ")],
)
def test_adam_distance_sees_every_part_of_the_state(planted: str, name: str) -> None:
    found = parity.adam_distance(*_stepped(amsgrad=True, planted=planted))
    assert abs(found.value - 1) <= 2 * EPS
    assert found.name.startswith(name)


def test_adam_distance_reads_the_state_of_nnx_optimizer() -> None:
    ours, _, theirs, twin = _stepped(amsgrad=False)
    optimizer = nnx.Optimizer(ours, optim.adamw(), wrt=nnx.Param)
    optimizer.update(ours, jax.tree.map(jnp.ones_like, nnx.state(ours, nnx.Param)))
    assert parity.adam_distance(ours, optimizer.opt_state, theirs, twin).value <= EPS


def test_adam_distance_wants_one_adam_state() -> None:
    ours, _, theirs, optimizer = _stepped(amsgrad=False)
    with pytest.raises(ValueError, match="state must hold one Adam state, got 0"):
        parity.adam_distance(ours, optax.EmptyState(), theirs, optimizer)


def test_small_tensors_count_as_large_as_the_floor() -> None:
    ours, theirs = {"b": np.array([2e-9])}, {"b": np.array([1e-9])}
    assert parity.distance(ours, theirs).value == 1
    assert parity.distance(ours, theirs, floor=2.0**-10).value == 1e-9 * 2**10
