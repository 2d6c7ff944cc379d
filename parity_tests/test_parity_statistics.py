"""The checks of random pieces keep both of their error probabilities, and refuse what cannot."""

import math
from collections.abc import Callable
from statistics import stdev

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy import stats

from flaxstab import initializers
from flaxstab.parity import Budget, Evidence, HasCdf, HasMean, IsNormal, SameLaw
from parity_tests.support import random_checks

Claim = HasCdf | HasMean | IsNormal | SameLaw
Law = Callable[[np.random.Generator, int], tuple[object, ...]]


def coin_cdf(x: np.ndarray) -> np.ndarray:
    """0 with probability 0.25, else 1."""
    return np.where(x >= 1, 1, np.where(x >= 0, 0.25, 0))


# Name: a claim, a law that it is true of, a law that is off by exactly the discrepancy.
CLAIMS: dict[str, tuple[Claim, Law, Law]] = {
    "cdf": (
        HasCdf(stats.uniform.cdf, discrepancy=0.2),
        lambda rng, n: (rng.random(n),),
        # What belongs into [0, 0.2) lies at 0.2: the distribution functions differ just below it.
        lambda rng, n: (np.maximum(rng.random(n), 0.2),),
    ),
    "discrete cdf": (
        HasCdf(coin_cdf, discrepancy=0.2),
        lambda rng, n: (rng.random(n) < 0.75,),
        lambda rng, n: (rng.random(n) < 0.95,),
    ),
    "two sides": (
        SameLaw(discrepancy=0.2),
        lambda rng, n: (rng.normal(size=n), rng.normal(size=n)),
        lambda rng, n: (rng.normal(size=n), rng.normal(2 * stats.norm.ppf(0.6), size=n)),
    ),
    "rate": (
        HasMean(0.75, discrepancy=0.1),
        lambda rng, n: (rng.random(n) < 0.75,),
        lambda rng, n: (rng.random(n) < 0.65,),
    ),
    "mean": (
        HasMean(3.0, discrepancy=0.2, low=2, high=4),
        lambda rng, n: (rng.uniform(2, 4, n),),
        lambda rng, n: (2 + 2 * rng.beta(1.2, 0.8, n),),
    ),
    "normal mean": (
        IsNormal(5.0, 2.0, discrepancy=0.2),
        lambda rng, n: (rng.normal(5, 2, n),),
        lambda rng, n: (rng.normal(5.4, 2, n),),
    ),
    "normal std": (
        IsNormal(5.0, 2.0, discrepancy=0.2),
        lambda rng, n: (rng.normal(5, 2, n),),
        lambda rng, n: (rng.normal(5, 1.6, n),),
    ),
}
every_claim = pytest.mark.parametrize("name", CLAIMS)
TIMES = 2000
FREQUENT = 0.05


def passes(claim: Claim, law: Law) -> np.ndarray:
    """Which of 2000 checks with fresh samples pass, with both error probabilities at 0.05."""
    rng = np.random.default_rng(0)
    n = claim.samples_needed(Budget(FREQUENT, 1, FREQUENT))
    draws = (law(rng, n) for _ in range(TIMES))
    return np.array([claim.check(*x, Budget(FREQUENT, 1, FREQUENT)).passed for x in draws])


def assert_not_above(events: np.ndarray, p: float, budget: Budget) -> None:
    """In 2000 events a probability of p + 0.08 would show but with probability 1e-6."""
    evidence = HasMean(p, discrepancy=0.08).check(events, budget)
    assert evidence.statistic <= evidence.bound[1], str(evidence)


@every_claim
def test_true_claims_fail_no_more_often_than_stated(name: str, budget: Budget) -> None:
    claim, law, _ = CLAIMS[name]
    assert_not_above(~passes(claim, law), FREQUENT, budget)


@every_claim
def test_laws_off_by_the_discrepancy_pass_no_more_often_than_stated(
    name: str, budget: Budget
) -> None:
    claim, _, wrong = CLAIMS[name]
    assert_not_above(passes(claim, wrong), FREQUENT, budget)


def test_events_more_frequent_than_stated_are_seen(budget: Budget) -> None:
    events = np.random.default_rng(0).random(2 * TIMES) < FREQUENT + 0.08
    with pytest.raises(AssertionError, match="must lie in"):
        assert_not_above(events, FREQUENT, random_checks.for_faults(budget))


# Faults that ports really have. Name: a claim, the samples that it takes, how the fault draws them.
RNG = np.random.default_rng(1)
FOUND = 5


def normals(n: int) -> np.ndarray:
    return RNG.normal(size=n)


def truncated(n: int) -> np.ndarray:
    """Truncated at two standard deviations and rescaled, as in ``jax.nn.initializers``."""
    return stats.truncnorm.rvs(-2, 2, size=n, random_state=RNG) / stats.truncnorm.std(-2, 2)


def in_bfloat16(n: int) -> np.ndarray:
    return jax.random.normal(jax.random.key(RNG.integers(2**31)), (n,), jnp.bfloat16)


HALF, NONE = HasMean(0.5, discrepancy=0.005), HasMean(0.0, discrepancy=0.001)
PERCENT = IsNormal(discrepancy=0.01)
TAIL = HasMean(2 * stats.norm.sf(3.0), discrepancy=0.002)  # beyond three standard deviations
SHAPE = HasCdf(stats.norm.cdf, discrepancy=0.015)
FAULTS: dict[str, tuple[Claim, int, Callable[[int], object]]] = {
    "std 1 % too large": (PERCENT, 1_600_000, lambda n: 1.01 * normals(n)),
    "std 1 % too small": (PERCENT, 1_600_000, lambda n: 0.99 * normals(n)),
    "mean 1 % of the std off": (PERCENT, 1_600_000, lambda n: normals(n) + 0.01),
    "fan_out 500, not fan_in 400": (
        IsNormal(0, 1 / 20, discrepancy=0.1),
        20_000,
        lambda n: normals(n) / math.sqrt(500),
    ),
    "truncated, same std": (SHAPE, 200_000, truncated),
    "uniform, same std": (SHAPE, 200_000, lambda n: RNG.uniform(-(3**0.5), 3**0.5, n)),
    "no tail": (TAIL, 250_000, lambda n: np.abs(np.clip(normals(n), -3, 3)) > 3),
    "drawn in bfloat16": (TAIL, 250_000, lambda n: np.abs(in_bfloat16(n)) > 3),
    "p = 0.505 for 0.5": (HALF, 1_600_000, lambda n: RNG.random(n) < 0.505),
    "mask repeated": (HasMean(0.25, discrepancy=0.25), 1_000, lambda n: RNG.random(n) < 0.5),
    "bound 0.2 % too large": (NONE, 25_000, lambda n: np.abs(RNG.uniform(-1.002, 1.002, n)) > 1),
    "never dropped": (HasMean(0.999, discrepancy=0.001), 250_000, np.ones),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_every_time(name: str, budget: Budget) -> None:
    """Five times of five, at false failure 1e-6; overlooking any has the probability 1e-9."""
    claim, n, faulty = FAULTS[name]
    paid = random_checks.for_faults(budget, FOUND)
    found = [claim.check(faulty(n), paid) for _ in range(FOUND)]
    assert not any(evidence.passed for evidence in found), "\n".join(map(str, found))


def test_two_frameworks_are_told_apart_and_only_by_their_laws(budget: Budget) -> None:
    """120,000 weights a side: PyTorch's uniform default against Flax's truncated normal."""
    key, n, claim = jax.random.key(0), 120_000, SameLaw(discrepancy=0.03)
    theirs = torch.empty(400, n // 400)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(theirs.T, math.sqrt(5))
    ours = initializers.torch_weight()(key, (400, n // 400))
    assert claim.check(ours, theirs, budget).passed
    paid = random_checks.for_faults(budget)
    assert not claim.check(nnx.initializers.lecun_normal()(key, ours.shape), theirs, paid).passed


# Bounds against exact tails, at probabilities too small to be measured.

ALPHA, BETA = 1e-9, 1e-6
STRICT = Budget(ALPHA, 1, BETA)


def evidence_of(claim: Claim, n: int, value: float) -> Evidence:
    return claim.check(np.full(n, value), Budget(ALPHA, 1, BETA))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("extra", [1, 3])
def test_the_bounds_of_a_rate_hold_for_the_exact_binomial_law(p: float, extra: int) -> None:
    claim = HasMean(p, discrepancy=0.02)
    n = extra * claim.samples_needed(STRICT)
    found = evidence_of(claim, n, p)
    low, high = (n * edge for edge in found.bound)
    outside = stats.binom.cdf(math.ceil(low) - 1, n, p) + stats.binom.sf(math.floor(high), n, p)
    assert outside <= ALPHA == found.false_failure
    rounding = n * np.finfo(np.float64).eps  # of the exponent: the bound is exact at p = 0
    for wrong in (p - 0.02, p + 0.02):
        if 0 <= wrong <= 1:
            inside = stats.binom.pmf(range(math.ceil(low), math.floor(high) + 1), n, wrong).sum()
            assert inside <= found.false_pass * (1 + rounding)
            assert found.false_pass <= BETA


@pytest.mark.parametrize("relative", [0.01, 0.3])
def test_the_bounds_of_normal_moments_hold_for_the_exact_laws(relative: float) -> None:
    claim = IsNormal(2.0, 3.0, discrepancy=relative)
    n = claim.samples_needed(STRICT)
    alternating = np.resize([-1.0, 1.0], n)
    shifted, narrow = (
        claim.check(x, Budget(ALPHA, 1, BETA)) for x in (9 + 3 * alternating, 2 + alternating)
    )
    assert (shifted.quantity, narrow.quantity) == ("mean", "standard deviation")
    assert max(shifted.false_pass, narrow.false_pass) <= BETA
    z = stats.norm(2.0, 3.0 / math.sqrt(n))
    squares = [(n - 1) * (edge / 3.0) ** 2 for edge in narrow.bound]
    tails = z.cdf(shifted.bound[0]) + z.sf(shifted.bound[1])
    assert tails + stats.chi2.cdf(squares[0], n - 1) + stats.chi2.sf(squares[1], n - 1) <= ALPHA
    wide = stats.norm(2.0 + 3.0 * relative, 3.0 * (1 + relative) / math.sqrt(n))
    assert wide.cdf(shifted.bound[1]) <= BETA
    assert stats.chi2.cdf(squares[1] / (1 + relative) ** 2, n - 1) <= BETA
    assert stats.chi2.sf(squares[0] / (1 - relative) ** 2, n - 1) <= BETA
    halves = [statistic.bound(n, ALPHA / 2) for statistic in claim._statistics()]
    assert halves == [shifted.bound, narrow.bound]  # so that both moments together cost ALPHA


def test_the_standard_deviation_of_two_samples_has_one_degree_of_freedom() -> None:
    _, std = IsNormal(discrepancy=1 - 1e-9)._statistics()
    assert stats.chi2.cdf(std.bound(2, 1e-3)[0] ** 2, 1) <= 1e-3 / 2
    x = np.resize([-3.0, 3.0], 600)
    found = IsNormal(discrepancy=0.9).check(x, Budget())
    assert found.statistic == pytest.approx(stdev(x), rel=1e-12)


def test_two_sides_need_the_size_from_which_their_bound_is_proven() -> None:
    assert SameLaw(discrepancy=0.9).samples_needed(Budget(0.5, 1, 0.5)) == 458


@pytest.mark.parametrize("discrepancy", [0.01, 0.1, 0.5])
def test_the_bound_of_a_distance_holds_for_the_exact_kolmogorov_law(discrepancy: float) -> None:
    claim = HasCdf(stats.uniform.cdf, discrepancy=discrepancy)
    n = claim.samples_needed(STRICT)
    assert stats.kstwo.sf(evidence_of(claim, n, 0.5).bound[1], n) <= ALPHA


@pytest.mark.parametrize(
    ("claim", "std"),
    [
        (HasCdf(stats.uniform.cdf, discrepancy=0.01), 0.5),
        (SameLaw(discrepancy=0.01), 0.5 * math.sqrt(2)),
        (HasMean(0.1, discrepancy=0.01), 0.3),
        (IsNormal(discrepancy=0.01), 1.0),
    ],
    ids=["cdf", "same", "mean", "normal"],
)
def test_samples_needed_is_within_a_third_of_the_best_possible(claim: Claim, std: float) -> None:
    """No test of a mean, even one-sided and with the central limit, needs fewer than ``best``."""
    z = stats.norm.isf(ALPHA) + stats.norm.isf(BETA)
    best = (z * std / 0.01) ** 2
    assert best <= claim.samples_needed(STRICT) <= 1.33 * best


# The statistics themselves.


@pytest.mark.parametrize("decimals", [None, 1])
def test_the_distances_are_the_suprema(decimals: int | None) -> None:
    """With ties too, where scipy's one-sample test is wrong: against a fine grid."""
    rng = np.random.default_rng(3)
    x, y = rng.beta(1.3, 1, 500), rng.random(500)
    if decimals is not None:
        x, y = x.round(decimals), y.round(decimals)
    found = HasCdf(stats.uniform.cdf, discrepancy=0.5).check(x, Budget()).statistic
    grid = np.unique(np.concatenate([x, np.nextafter(x, -1), [0.0, 1.0]]))
    brute = max(abs(np.mean(x <= point) - point) for point in grid)
    assert found == pytest.approx(brute, rel=1e-12)
    both = SameLaw(discrepancy=0.5).check(x, y, Budget()).statistic
    assert both == pytest.approx(stats.ks_2samp(x, y).statistic, rel=1e-12)


def test_atoms_are_compared_on_both_sides() -> None:
    claim = HasCdf(coin_cdf, discrepancy=0.5)
    assert claim.check([0, 1, 1, 1] * 100, Budget()).statistic == 0
    assert claim.check([0.5] * 400, Budget()).statistic == 0.75
    assert claim.check([-1] * 400, Budget()).statistic == 1


def test_a_rate_of_zero_or_one_admits_nothing_else() -> None:
    for p, low, high in [(0, 0, 1), (1, 0, 1), (0.1, 0.1, 0.7), (0.7, 0.1, 0.7)]:
        claim = HasMean(p, discrepancy=0.01, low=low, high=high)
        x = np.full(20_000, float(p))
        assert claim.check(x, Budget()).bound == (p, p)
        assert claim.check(x, Budget()).passed
        x[7] = 0.5
        assert not claim.check(x, Budget()).passed


@every_claim
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_not_finite_fails(name: str, bad: float) -> None:
    claim, law, _ = CLAIMS[name]
    *first, last = law(np.random.default_rng(4), 5000)
    last = np.asarray(last, np.float64)
    last[11] = bad
    found = claim.check(*first, last, Budget())
    assert not found.passed
    assert "there is none (NaN or infinite samples: 1)" in str(found)


def test_one_sample_outside_the_interval_fails() -> None:
    x = np.full(5000, 3.0)
    x[5] = 4.0001
    found = HasMean(3.0, discrepancy=0.2, low=2, high=4).check(x, Budget())
    assert not found.passed
    assert "(samples outside [2, 4]: 1)" in str(found)


def test_constant_samples_are_not_normal() -> None:
    found = IsNormal(discrepancy=0.5).check(np.zeros(5000), Budget())
    assert (found.quantity, found.passed) == ("standard deviation", False)


def test_samples_may_be_of_any_shape_and_dtype() -> None:
    claim = HasMean(0.5, discrepancy=0.2)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int32, bool):
        assert claim.check(jnp.arange(2000).reshape(2, -1) % 2 == 0, Budget()).passed
        assert claim.check((np.arange(2000) % 2).astype(dtype), Budget()).passed


def test_evidence_is_one_sentence_with_n_the_bound_and_both_errors() -> None:
    found = HasMean(0.5, discrepancy=0.2).check(np.arange(2000) % 2 == 0, Budget(1e-6, 4, 1e-5))
    low, high = found.bound
    assert str(found) == (
        f"The mean of 2,000 samples must lie in [{low:.6g}, {high:.6g}] and it is 0.5: true claims "
        f"fail with probability at most 2e-07, laws off by 0.2 pass with at most "
        f"{found.false_pass:.1g}."
    )
    assert (found.samples, found.discrepancy, found.false_failure) == (2000, 0.2, 2.5e-7)
    assert found.false_pass <= 1e-5
    assert found.power == 1 - found.false_pass


# What is refused.


@every_claim
def test_one_sample_too_few_is_refused_and_costs_nothing(name: str) -> None:
    claim, law, _ = CLAIMS[name]
    rng, one = np.random.default_rng(5), Budget()
    n = claim.samples_needed(one)
    with pytest.raises(ValueError, match=f"takes {n} samples, got samples={n - 1}. Draw more"):
        claim.check(*law(rng, n - 1), one)
    assert one.spent == 0
    assert claim.check(*law(rng, n), one).samples == n
    assert one.spent == 1


@every_claim
def test_no_samples_are_refused(name: str) -> None:
    claim, law, _ = CLAIMS[name]
    with pytest.raises(ValueError, match="samples must not be empty, got samples=0"):
        claim.check(*law(np.random.default_rng(0), 0), Budget())


@pytest.mark.parametrize("discrepancy", [0.0, 1.0, -0.1, math.nan])
def test_discrepancies_out_of_range_are_refused(discrepancy: float) -> None:
    for make in (lambda **d: HasCdf(coin_cdf, **d), SameLaw, IsNormal):
        with pytest.raises(ValueError, match="discrepancy must lie between 0 and 1, both excluded"):
            make(discrepancy=discrepancy)
    with pytest.raises(ValueError, match=r"positive and at most 0.7, for a mean in \[low, high\]"):
        HasMean(0.3, discrepancy=discrepancy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HasMean(1.5, discrepancy=0.1), r"expected must lie in \[low, high\], got expec"),
        (lambda: HasMean(0, discrepancy=1, low=0, high=0), r"expected must lie in \[low, high\]"),
        (lambda: IsNormal(0, 0, discrepancy=0.1), "std must be positive and finite, got std=0"),
        (lambda: IsNormal(0, math.inf, discrepancy=0.1), "std must be positive and finite"),
        (
            lambda: IsNormal(discrepancy=1e-7).samples_needed(Budget()),
            r"visible in fewer than 2\*\*40 samples, got discrepancy=1e-07. Raise discrepancy",
        ),
        (
            lambda: SameLaw(discrepancy=0.1).check(np.ones(9), np.ones(8), Budget()),
            "both sides must have as many samples, got ours=9 and theirs=8",
        ),
        (
            lambda: HasCdf(np.exp, discrepancy=0.5).check(np.ones(999), Budget()),
            "cdf must return a probability for every point",
        ),
        (
            lambda: HasCdf(np.max, discrepancy=0.5).check(np.ones(999), Budget()),
            "cdf must return a probability for every point, got shape=\\(\\) and points=\\(1,\\)",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
