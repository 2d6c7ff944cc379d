"""The budget of random checks: what is announced bounds what is spent."""

from types import SimpleNamespace

import numpy as np
import pytest

from flaxstab.parity import Budget, HasMean
from parity_tests.support import random_checks


@pytest.mark.parametrize("value", [0.0, 0.6, -1e-6, float("nan")])
@pytest.mark.parametrize("name", ["false_failure", "false_pass"])
def test_probabilities_that_bound_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a probability in \(0, 0.5\], got"):
        Budget(**{name: value})


def test_a_budget_is_for_one_check_at_least() -> None:
    with pytest.raises(ValueError, match="checks must be at least 1, got checks=0"):
        Budget(checks=0)


def test_checks_beyond_the_announced_number_are_refused() -> None:
    two, claim, x = Budget(checks=2), HasMean(0, discrepancy=0.1), np.zeros(1000)
    for spent in (1, 2):
        assert claim.check(x, two).false_failure == two.per_check == 5e-7
        assert two.spent == spent
    rule = r"pays for the checks that it announced, got checks=2 and asked=3. Announce Budget\(ch"
    with pytest.raises(ValueError, match=rule):
        claim.check(x, two)


def test_a_share_is_paid_by_the_whole() -> None:
    whole = Budget(1e-6, 10, 1e-3)
    part = whole.share(4)
    assert (whole.spent, part.checks, part.false_pass) == (4, 4, 1e-3)
    assert part.per_check == pytest.approx(whole.per_check, rel=1e-15)
    with pytest.raises(ValueError, match="got checks=10 and asked=11"):
        whole.share(7)


def test_the_suite_announces_no_more_checks_than_its_budget(
    request: pytest.FixtureRequest,
) -> None:
    """Every process collects every test, so xdist cannot hide a check from this sum."""
    assert random_checks.announced(request.session.items) <= random_checks.SUITE.checks


def test_a_test_that_asks_for_the_budget_announces_its_whole_share(budget: Budget) -> None:
    asks, does_not = SimpleNamespace(fixturenames=["budget"]), SimpleNamespace()
    assert random_checks.announced([asks, does_not, asks]) == 2 * budget.checks == 16
    assert budget.per_check == pytest.approx(1e-9, rel=1e-15)
