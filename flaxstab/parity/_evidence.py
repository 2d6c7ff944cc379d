"""A suite's budget for random checks, and the exponential bounds that evidence is weighed by.

Beyond ``value`` a statistic of n samples with the limit ``truth`` has a tail of at most
``exp(-n * rate(value, truth))``, for every n. From that follow both the interval that a true claim
does not leave and the probability that a wrong law is found in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from flaxstab._checks import check


@dataclass
class Budget:
    """What a number of random checks may cost together.

    The split is fixed in advance (``false_failure / checks`` each: a union bound, so the checks may
    share samples), and a check more than announced is refused.

    Attributes:
      false_failure: probability that any of the checks fails although all claims are true.
      checks: how many checks there are, at most.
      false_pass: probability that a check passes although its law is off by the discrepancy, each.
      spent: how many checks have been made.

    Raises:
      ValueError: if a probability is not in (0, 0.5], or ``checks`` is less than 1.

    Example:
      >>> import numpy as np
      >>> from flaxstab.parity import HasMean
      >>> suite = Budget(false_failure=1e-6, checks=100)
      >>> claim = HasMean(0.9, discrepancy=0.01)
      >>> n = claim.samples_needed(suite)
      >>> kept = np.random.default_rng(0).random(n) < 0.9
      >>> claim.check(kept, suite).passed
      True
      >>> suite.spent
      1
    """

    false_failure: float = 1e-6
    checks: int = 1
    false_pass: float = 1e-6
    spent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("false_failure", "false_pass"):
            value = getattr(self, name)
            check(0 < value <= 0.5, f"{name} must be a probability in (0, 0.5]", **{name: value})
        check(self.checks >= 1, "checks must be at least 1", checks=self.checks)

    @property
    def per_check(self) -> float:
        """One check's part of ``false_failure``."""
        return self.false_failure / self.checks

    def spend(self, checks: int = 1) -> float:
        """Counts checks that are about to be made; returns the part of ``false_failure`` of each.

        Raises:
          ValueError: if they are more than announced.
        """
        check(
            self.spent + checks <= self.checks,
            "a budget pays for the checks that it announced",
            fix=f"Announce Budget(checks={self.spent + checks}) or more.",
            checks=self.checks,
            asked=self.spent + checks,
        )
        self.spent += checks
        return self.per_check

    def share(self, checks: int) -> "Budget":
        """Returns a budget for some of the checks, paid for by this one."""
        return Budget(self.spend(checks) * checks, checks, self.false_pass)


class Evidence(NamedTuple):
    """What a check found; its string is one sentence.

    Attributes:
      quantity: what was measured.
      statistic: its value; NaN if ``fault`` says why there is none.
      bound: the values that count as agreement.
      samples: their number (on either side).
      discrepancy: how far the law may not be off.
      false_failure: bound on the probability of failing although the claim is true.
      false_pass: bound on the probability of passing although the law is off by ``discrepancy``.
      fault: what is wrong with the samples themselves, or nothing.
    """

    quantity: str
    statistic: float
    bound: tuple[float, float]
    samples: int
    discrepancy: float
    false_failure: float
    false_pass: float
    fault: str = ""

    @property
    def passed(self) -> bool:
        """Whether the samples agree with the claim."""
        return self.bound[0] <= self.statistic <= self.bound[1]

    @property
    def power(self) -> float:
        """Bound on the probability of failing if the law is off by the discrepancy."""
        return 1 - self.false_pass

    def __str__(self) -> str:
        """Says the finding, the bound and both error probabilities."""
        low, high = self.bound
        found = f"there is none ({self.fault})" if self.fault else f"it is {self.statistic:.6g}"
        return (
            f"The {self.quantity} of {self.samples:,} samples must lie in [{low:.6g}, {high:.6g}]"
            f" and {found}: true claims fail with probability at most {self.false_failure:.1g},"
            f" laws off by {self.discrepancy:.3g} pass with at most {self.false_pass:.1g}."
        )


class Statistic(NamedTuple):
    """A number estimated from samples, and how fast its tails fall.

    Attributes:
      quantity: its name.
      expected: its limit if the claim is true.
      ends: between them, around ``expected``, agreement is sought.
      wrong: its limits under the nearest laws that are off by the discrepancy.
      rate: of (value, truth), see the module.
      lost: degrees of freedom that estimating something else costs.
    """

    quantity: str
    expected: float
    ends: tuple[float, float]
    wrong: tuple[float, ...]
    rate: Callable[[float, float], float]
    lost: int = 0

    def bound(self, n: int, alpha: float) -> tuple[float, float]:
        """Returns the interval that a true claim leaves with probability alpha at most.

        Never more than the ends: too few samples show as a :meth:`false_pass` of 1.
        """
        allowed = math.log(2 / alpha)
        low, high = (self._edge(end, n, allowed) for end in self.ends)
        return low, high

    def _edge(self, end: float, n: int, allowed: float) -> float:
        """Returns the value furthest towards an end whose exponent is allowed, by bisection."""

        def is_allowed(value: float) -> bool:
            return (n - self.lost) * self.rate(value, self.expected) <= allowed

        near, far = self.expected, end
        if is_allowed(end):
            return end
        for _ in range(64):
            middle = near + (far - near) / 2
            near, far = (middle, far) if is_allowed(middle) else (near, middle)
        return near

    def false_pass(self, n: int, bound: tuple[float, float]) -> float:
        """Returns the probability that a wrong law's statistic is within the bound, at most."""
        low, high = bound
        exponents = [
            (n - self.lost) * self.rate(low if truth < self.expected else high, truth)
            for truth in self.wrong
        ]
        return math.exp(-min(exponents))
