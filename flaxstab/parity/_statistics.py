"""Judges random pieces by their law, with the probability of either error bounded.

A claim about a law (:class:`HasCdf`, :class:`HasMean`, :class:`IsNormal`, :class:`SameLaw`) names
the discrepancy that it must see. Checking it on independent samples can go wrong in two ways: the
claim is true and the check fails, or the law is off by the discrepancy and the check passes. Both
probabilities are bounded for every sample size, not asymptotically, and samples too few for that
are refused. A :class:`Budget` bounds the first error for a whole suite.

Reference:
  P. Massart, "The Tight Constant in the Dvoretzky-Kiefer-Wolfowitz Inequality", Annals of
  Probability 18, 1990; F. Wei, R. M. Dudley, "Two-Sample Dvoretzky-Kiefer-Wolfowitz Inequalities",
  2012, arXiv:1107.5356; W. Hoeffding, "Probability Inequalities for Sums of Bounded Random
  Variables", 1963 (theorem 1). The two-sided experiment design is that of TensorFlow Probability's
  ``statistical_testing``.
"""

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import ArrayLike

from flaxstab._checks import check
from flaxstab._typing import Float
from flaxstab.parity._evidence import Budget, Evidence, Statistic

MOST_SAMPLES = 2**40  # far beyond it the rates are lost in float64's rounding
EQUAL_SIZES = 458  # from here on Wei and Dudley's constant is 2, as in the one-sample inequality

Samples = Float[np.ndarray, "n"]


class _Claim(ABC):
    """What all claims share: how many samples they need, and how evidence is weighed."""

    discrepancy: float

    @abstractmethod
    def _statistics(self) -> tuple[Statistic, ...]:
        """Returns the statistics that must all agree."""

    def samples_needed(self, budget: Budget) -> int:
        """Returns the smallest number of samples with which both error probabilities hold.

        Raises:
          ValueError: if that is more than 2**40.
        """
        most = 1
        while not self._sees(most, budget):
            check(
                most < MOST_SAMPLES,
                "discrepancy must be visible in fewer than 2**40 samples",
                fix="Raise discrepancy.",
                discrepancy=self.discrepancy,
            )
            most *= 2
        return 1 + bisect.bisect_left(range(1, most), True, key=lambda n: self._sees(n, budget))

    def _sees(self, n: int, budget: Budget) -> bool:
        statistics = self._statistics()
        alpha = budget.per_check / len(statistics)
        return all(s.false_pass(n, s.bound(n, alpha)) <= budget.false_pass for s in statistics)

    def _weigh(
        self, values: Callable[[], tuple[float, ...]], fault: str, n: int, budget: Budget
    ) -> Evidence:
        """Returns the evidence of the first statistic that disagrees, or of the first one."""
        if not self._sees(n, budget):
            needed = self.samples_needed(budget)
            rule = f"a discrepancy of {self.discrepancy:.3g} takes {needed} samples"
            check(n >= needed, rule, fix="Draw more, or raise discrepancy.", samples=n)
        false_failure = budget.spend()
        statistics = self._statistics()
        found = (math.nan,) * len(statistics) if fault else values()
        evidence = []
        for statistic, value in zip(statistics, found, strict=True):
            bound = statistic.bound(n, false_failure / len(statistics))
            errors = false_failure, statistic.false_pass(n, bound)
            measured = statistic.quantity, value, bound, n, self.discrepancy
            evidence.append(Evidence(*measured, *errors, fault))
        return min(evidence, key=lambda e: e.passed)


@dataclass(frozen=True)
class HasCdf(_Claim):
    """The claim that samples have a distribution function, of a continuous or a discrete law.

    Args:
      cdf: probabilities of at most x, for a float64 array. The atoms of a discrete law must be the
        very floats that are drawn: compare with ``np.float32(0.1)``, not 0.1.
      discrepancy: the largest difference of the distribution functions that may not pass.

    Raises:
      ValueError: if ``discrepancy`` is not in (0, 1).

    Example:
      >>> budget = Budget()
      >>> claim = HasCdf(lambda x: np.clip(x, 0, 1), discrepancy=0.02)
      >>> claim.samples_needed(budget)
      70800
      >>> rng = np.random.default_rng(0)
      >>> claim.check(rng.random(71_000) ** 1.1, budget).passed
      False
    """

    cdf: Callable[[Samples], Samples]
    _: KW_ONLY
    discrepancy: float

    def __post_init__(self) -> None:
        _check_distance(self.discrepancy)

    def _statistics(self) -> tuple[Statistic, ...]:
        return (_distance("distance from the distribution function", self.discrepancy, 1.0),)

    def check(self, samples: ArrayLike, budget: Budget) -> Evidence:
        """Returns the evidence of samples; NaN and infinity fail.

        Raises:
          ValueError: if there are too few samples, the budget is spent, or ``cdf`` returns
            something other than probabilities.
        """
        x = _flat(samples)
        return self._weigh(lambda: (self._largest_gap(x),), _nonfinite(x), x.size, budget)

    def _largest_gap(self, x: Samples) -> float:
        """Returns sup |F_n - F|: between two samples F_n is constant, so at its ends F decides."""
        points, counts = np.unique(x, return_counts=True)
        until = np.concatenate([[0], np.cumsum(counts)]) / x.size
        at, before = self._at(points), self._at(np.nextafter(points, -np.inf))
        return float(max(np.abs(until[1:] - at).max(), np.abs(until[:-1] - before).max()))

    def _at(self, points: Samples) -> Samples:
        found = np.asarray(self.cdf(points), np.float64)
        is_law = found.shape == points.shape and bool(((found >= 0) & (found <= 1)).all())
        rule = "cdf must return a probability for every point"
        check(is_law, rule, shape=found.shape, points=points.shape)
        return found


@dataclass(frozen=True)
class SameLaw(_Claim):
    """The claim that two sets of samples have one law, whatever it is: for two frameworks.

    Args:
      discrepancy: the largest difference of the distribution functions that may not pass.

    Raises:
      ValueError: if ``discrepancy`` is not in (0, 1).

    Example:
      >>> rng = np.random.default_rng(0)
      >>> claim = SameLaw(discrepancy=0.05)
      >>> claim.check(rng.normal(size=25_000), rng.uniform(-2, 2, 25_000), Budget()).passed
      False
    """

    _: KW_ONLY
    discrepancy: float

    def __post_init__(self) -> None:
        _check_distance(self.discrepancy)

    def _statistics(self) -> tuple[Statistic, ...]:
        return (_distance("distance of the distribution functions", self.discrepancy, 0.5),)

    def _sees(self, n: int, budget: Budget) -> bool:
        return n >= EQUAL_SIZES and super()._sees(n, budget)

    def check(self, ours: ArrayLike, theirs: ArrayLike, budget: Budget) -> Evidence:
        """Returns the evidence of two equally large sets of samples; NaN and infinity fail.

        Raises:
          ValueError: if the sets differ in size or are too small, or the budget is spent.
        """
        a, b = np.sort(_flat(ours)), np.sort(_flat(theirs))
        check(a.size == b.size, "both sides must have as many samples", ours=a.size, theirs=b.size)

        def largest_gap() -> tuple[float, ...]:
            points = np.concatenate([a, b])
            counts = (np.searchsorted(side, points, "right") for side in (a, b))
            return (float(np.abs(np.subtract(*counts)).max() / a.size),)

        return self._weigh(largest_gap, _nonfinite(a) or _nonfinite(b), a.size, budget)


@dataclass(frozen=True)
class HasMean(_Claim):
    """The claim that samples of an interval have a mean, whatever their law; by default: a rate.

    For moments pass powers of the samples, for a support or a tail the truth values of membership:
    ``HasMean(0.0, discrepancy=1e-4).check(x > high, budget)``.

    Args:
      expected: the mean.
      discrepancy: how far the mean of a law on the interval may not be off.
      low: the smallest possible sample.
      high: the largest possible sample. Samples outside fail: widen by the rounding of low dtypes.

    Raises:
      ValueError: if ``expected`` is not in [low, high], or no mean there is ``discrepancy`` off.

    Example:
      >>> kept = np.random.default_rng(0).random(50_000) < 0.9
      >>> print(HasMean(0.88, discrepancy=0.02).check(kept, Budget()))
      The mean of 50,000 samples must lie in [0.872099, 0.887754] and it is 0.90176: true claims \
fail with probability at most 1e-06, laws off by 0.02 pass with at most 3e-14.
    """

    expected: float
    _: KW_ONLY
    discrepancy: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check(
            self.low <= self.expected <= self.high and self.low < self.high,
            "expected must lie in [low, high]",
            expected=self.expected,
            low=self.low,
            high=self.high,
        )
        room = max(self.expected - self.low, self.high - self.expected)
        check(
            0 < self.discrepancy <= room,
            f"discrepancy must be positive and at most {room:.6g}, for a mean in [low, high]",
            discrepancy=self.discrepancy,
        )

    def _statistics(self) -> tuple[Statistic, ...]:
        wrong = [self.expected - self.discrepancy, self.expected + self.discrepancy]
        ends = max(wrong[0], self.low), min(wrong[1], self.high)
        possible = tuple(mean for mean in wrong if self.low <= mean <= self.high)
        return (Statistic("mean", self.expected, ends, possible, self._rate),)

    def _rate(self, value: float, truth: float) -> float:
        width = self.high - self.low
        return _divergence((value - self.low) / width, (truth - self.low) / width)

    def check(self, samples: ArrayLike, budget: Budget) -> Evidence:
        """Returns the evidence of samples; NaN, infinity and samples outside [low, high] fail.

        Raises:
          ValueError: if there are too few samples or the budget is spent.
        """
        x = _flat(samples)
        outside = int(((x < self.low) | (x > self.high)).sum())
        ends = f"[{self.low:.6g}, {self.high:.6g}]"
        fault = f"samples outside {ends}: {outside:,}" if outside else ""

        def mean() -> tuple[float, ...]:
            # Exact at both ends, where the bound may be a single value.
            part = float(np.mean((x - self.low) / (self.high - self.low)))
            return (self.low * (1 - part) + self.high * part,)

        return self._weigh(mean, _nonfinite(x) or fault, x.size, budget)


@dataclass(frozen=True)
class IsNormal(_Claim):
    """The claim that normal samples have a mean and a standard deviation.

    Both moments are checked, each with half of the check's ``false_failure``. The power is that
    against other normal laws; for the shape use :class:`HasCdf`.

    Args:
      mean: of the law.
      std: its standard deviation, positive.
      discrepancy: how far, in units of ``std``, either may not be off: 0.01 = 1 %.

    Raises:
      ValueError: if ``std`` is not positive or ``discrepancy`` not in (0, 1).

    Example:
      >>> claim = IsNormal(0.0, 1.0, discrepancy=0.05)
      >>> samples = 1.05 * np.random.default_rng(0).normal(size=50_000)
      >>> evidence = claim.check(samples, Budget())
      >>> evidence.quantity, evidence.passed
      ('standard deviation', False)
    """

    mean: float = 0.0
    std: float = 1.0
    _: KW_ONLY
    discrepancy: float

    def __post_init__(self) -> None:
        check(0 < self.std < math.inf, "std must be positive and finite", std=self.std)
        _check_distance(self.discrepancy)

    def _statistics(self) -> tuple[Statistic, ...]:
        def mean_rate(value: float, truth: float) -> float:
            # A law with another mean may also be wider, by less than what the other check sees.
            std = self.std if truth == self.mean else self.std * (1 + self.discrepancy)
            return ((value - truth) / std) ** 2 / 2

        off = self.std * self.discrepancy
        means = self.mean - off, self.mean + off
        stds = self.std - off, self.std + off
        return (
            Statistic("mean", self.mean, means, means, mean_rate),
            Statistic("standard deviation", self.std, stds, stds, _chi_square_rate, lost=1),
        )

    def check(self, samples: ArrayLike, budget: Budget) -> Evidence:
        """Returns the evidence of the moment that disagrees, or of the mean; NaN and infinity fail.

        Raises:
          ValueError: if there are too few samples or the budget is spent.
        """
        x = _flat(samples)

        def moments() -> tuple[float, ...]:
            return float(x.mean()), float(x.std(ddof=1))

        return self._weigh(moments, _nonfinite(x), x.size, budget)


def _distance(quantity: str, discrepancy: float, share: float) -> Statistic:
    """Returns the supremum of the difference of two distribution functions.

    Under the claim its tail is Massart's ``2 exp(-2 n t²)`` (``share`` 1), with two sets of
    samples Wei and Dudley's ``2 exp(-n t²)`` (0.5). For a wrong law Hoeffding's inequality at the
    point of the largest difference gives the same exponent without the factor 2. Atoms only
    shrink the supremum.
    """

    def rate(value: float, truth: float) -> float:
        return share * 2 * (value - truth) ** 2

    return Statistic(quantity, 0.0, (0.0, discrepancy), (discrepancy,), rate)


def _divergence(value: float, truth: float) -> float:
    """Kullback-Leibler divergence of two coins: the rate of the mean of samples in [0, 1]."""

    def term(a: float, b: float) -> float:
        if a == 0:
            return 0.0
        return a * math.log(a / b) if b > 0 else math.inf

    return max(0.0, term(value, truth) + term(1 - value, 1 - truth))


def _chi_square_rate(value: float, truth: float) -> float:
    """Rate of the standard deviation of normal samples: Chernoff's bound for chi-square / n."""
    ratio = (value / truth) ** 2
    return (ratio - 1 - math.log(ratio)) / 2


def _check_distance(discrepancy: float) -> None:
    rule = "discrepancy must lie between 0 and 1, both excluded"
    check(0 < discrepancy < 1, rule, discrepancy=discrepancy)


def _flat(samples: ArrayLike) -> Samples:
    x = np.asarray(samples, np.float64).ravel()
    check(x.size > 0, "samples must not be empty", samples=x.size)
    return x


def _nonfinite(x: Samples) -> str:
    count = int((~np.isfinite(x)).sum())
    return f"NaN or infinite samples: {count:,}" if count else ""
