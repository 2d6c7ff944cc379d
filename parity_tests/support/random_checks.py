"""The suite's one budget for random checks; a test takes its share through a fixture.

A test that asks for the fixture ``budget`` may make ``CHECKS_PER_TEST`` checks with it. So the
number of checks is at most that times the number of tests that ask: known after collection, and the
same however xdist deals them out. ``test_parity_evidence`` holds it against the budget.
"""

from collections.abc import Sequence

import pytest

from flaxstab.parity import Budget

SUITE = Budget(false_failure=1e-6, checks=1000)
CHECKS_PER_TEST = 8


@pytest.fixture
def budget() -> Budget:
    """One test's share: each of its checks fails falsely with probability 1e-9."""
    return SUITE.share(CHECKS_PER_TEST)


def announced(items: Sequence[object]) -> int:
    """Returns how many random checks the collected tests may make."""
    return CHECKS_PER_TEST * sum("budget" in getattr(item, "fixturenames", ()) for item in items)


def for_faults(budget: Budget, faults: int = 1) -> Budget:
    """Returns a budget to find planted faults with, where overlooking one is a false failure.

    Args:
      budget: pays one check for all of them together.
      faults: how many there are, at most.
    """
    return Budget(checks=faults, false_pass=budget.spend() / faults)


def divided(budget: Budget, checks: int) -> Budget:
    """Returns a budget for many checks that together cost one check of another."""
    return Budget(budget.spend(), checks, budget.false_pass)
