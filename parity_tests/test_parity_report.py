"""A report fits one screen, shows the gravest first, and names a side where it can."""

import itertools

import numpy as np
import pytest

from flaxstab.parity import Departure, Finding, Report, Tolerance, Verdict
from flaxstab.parity._report import check_tolerances, factor_of
from parity_tests.support.pairs import refusal

SCREEN = 24  # lines of a terminal
PASSING = {Verdict.AGREE, Verdict.TORCH_WORSE, Verdict.ILL_CONDITIONED}
GRAVITY = [
    Verdict.SEMANTICS_DIFFER,
    Verdict.JAX_WORSE,
    Verdict.TORCH_WORSE,
    Verdict.ILL_CONDITIONED,
    Verdict.AGREE,
]


def found(
    name: str = "output", kind: Verdict = Verdict.AGREE, dtype: str = "float64",
    error: float = 0.5, side: str = "",
) -> Finding:  # fmt: skip
    return Finding(name, kind, dtype, error, 0.0, 1.0, f"words about {name}", side)


def report(*kinds: Verdict) -> Report:
    return Report(tuple(found(f"q{i}", kind) for i, kind in enumerate(kinds)))


def test_a_report_of_a_hundred_failures_fits_one_screen() -> None:
    findings = [
        found(f"grad layer{i}.weight", Verdict.SEMANTICS_DIFFER, error=1.0 + i) for i in range(100)
    ]
    notes = tuple(f"note {i}" for i in range(50))
    tolerances = (Tolerance("output", 2.0, "a reason"),)
    many = Report(tuple(findings), notes, tolerances, Departure(3, "loss", "float64", 2.0))
    lines = str(many).splitlines()
    assert len(lines) <= SCREEN
    assert lines[0].startswith("semantics_differ: 100 semantics_differ of 100 quantities")
    assert lines[1] == "  first apart: loss after step 3, in float64"
    told = [line for line in lines if "words about" in line]
    assert len(told) == 8
    assert any(line.endswith("and 92 more in report.findings") for line in lines)
    assert "  tolerance: output x2, because a reason" in lines
    assert all(len(line) < 200 for line in lines)


def test_a_report_of_few_failures_shows_them_all_and_nothing_else() -> None:
    two = Report(
        (
            found("a", Verdict.SEMANTICS_DIFFER, error=3.0),
            found("b", Verdict.AGREE),
            found("c", Verdict.JAX_WORSE, "float32", 2.0, "jax"),
            found("d", Verdict.TORCH_WORSE, "float32", 0.1, "torch"),
            found("e", Verdict.ILL_CONDITIONED),
        )
    )
    lines = str(two).splitlines()
    assert lines[0] == (
        "semantics_differ: 1 semantics_differ, 1 jax_worse, 1 torch_worse, 1 ill_conditioned, "
        "1 agree of 5 quantities"
    )
    assert "more in report.findings" not in str(two)
    assert [line.split(": ")[1].split()[0] for line in lines if "words about" in line] == [*"ac"]
    assert "  jax_worse, jax: c in float32: words about c (2 x the bound)" in lines


def test_failures_of_float64_come_first() -> None:
    low = [found(f"low{i}", Verdict.JAX_WORSE, "float32", 1e9, "jax") for i in range(20)]
    both = Report((*low, found("wide", Verdict.SEMANTICS_DIFFER, error=1.1)))
    told = [line for line in str(both).splitlines() if "words about" in line]
    assert "wide in float64" in told[0]
    assert "low0 in float32" in told[1]
    assert both.worst.name == "wide"


def test_what_is_worse_in_torch_is_told_if_nothing_fails() -> None:
    worse = [found(f"t{i}", Verdict.TORCH_WORSE, "float32", 0.1, "torch") for i in range(3)]
    ours = found("ours", Verdict.JAX_WORSE, "float32", 1.1, "jax")
    for findings, names in ((worse, ["t0", "t1", "t2"]), ([*worse, ours], ["ours"])):
        told = [line for line in str(Report(tuple(findings))).splitlines() if "words" in line]
        assert [line.split(": ")[1].split()[0] for line in told] == names


def test_what_follows_from_an_earlier_step_is_not_told_again() -> None:
    names = [f"step {n} {kind}" for n in (1, 2, 10) for kind in ("running_mean", "running_var")]
    findings = tuple(found(name, Verdict.SEMANTICS_DIFFER, error=2.0) for name in names)
    told = [line for line in str(Report(findings)).splitlines() if "words" in line]
    assert [line.split(": ")[1].split(" in ")[0] for line in told] == names[:2]
    late = [line for line in str(Report(findings[3:])).splitlines() if "words" in line]
    assert len(late) == 2  # running_mean after 10 steps, running_var after 2


@pytest.mark.parametrize("kinds", list(itertools.combinations(GRAVITY, 2)), ids="-".join)
def test_the_gravest_verdict_is_the_reports(kinds: tuple[Verdict, ...]) -> None:
    graver, milder = kinds
    for order in (kinds, kinds[::-1]):
        both = report(*order)
        expected = Verdict.AGREE if graver == Verdict.ILL_CONDITIONED else graver
        assert both.verdict == expected
        assert str(both).startswith(f"{expected}: ")
        assert both.worst.verdict == graver
        assert both.passed == ({*kinds} <= PASSING)
    assert report(milder).verdict == milder


@pytest.mark.parametrize("kind", GRAVITY)
def test_a_finding_passes_if_jax_is_as_it_should_be(kind: Verdict) -> None:
    assert found(kind=kind).passed is (kind in PASSING)
    assert report(kind).passed is (kind in PASSING)


def test_a_report_without_findings_agrees() -> None:
    empty = Report(())
    assert empty.passed
    assert (empty.verdict, empty.side) == (Verdict.AGREE, "")


def test_the_worst_is_the_gravest_and_of_these_the_furthest_out() -> None:
    findings = (
        found("a", Verdict.JAX_WORSE, "float32", 1e9, "jax"),
        found("b", Verdict.SEMANTICS_DIFFER, error=5.0),
        found("c", Verdict.SEMANTICS_DIFFER, error=7.0),
        found("d", Verdict.SEMANTICS_DIFFER, error=6.0),
    )
    assert Report(findings).worst.name == "c"
    assert Report(findings[:2]).worst.name == "b"


def test_the_side_is_that_of_the_gravest_finding_that_names_one() -> None:
    nobody = found("a", Verdict.SEMANTICS_DIFFER, error=9.0)
    torchs = found("b", Verdict.SEMANTICS_DIFFER, error=3.0, side="torch")
    ours = found("c", Verdict.SEMANTICS_DIFFER, error=4.0, side="jax")
    low = found("d", Verdict.JAX_WORSE, "float32", 1e6, "jax")
    rows = [
        ((nobody,), ""),
        ((nobody, torchs), "torch"),
        ((nobody, torchs, ours), "jax"),
        ((torchs, low), "torch"),
        ((nobody, low), ""),
        ((low,), "jax"),
    ]
    for findings, side in rows:
        one = Report(findings)
        assert one.side == side
        assert (f"({side} is at fault)" in str(one).splitlines()[0]) is bool(side)


def test_the_excess_is_the_error_over_the_bound() -> None:
    assert Finding("q", Verdict.AGREE, "float64", 3.0, 0.0, 2.0, "").excess == 1.5
    assert Finding("q", Verdict.AGREE, "float64", 0.0, 0.0, 0.0, "").excess == 0
    assert Finding("q", Verdict.AGREE, "float64", 1.0, 0.0, 0.0, "").excess == np.inf


def test_a_report_that_agrees_is_two_lines_and_its_notes() -> None:
    one = Report((found(), found("grad input 0", error=0.7)), ("a", "b", "c", "d"))
    lines = str(one).splitlines()
    assert lines[0] == "agree: 2 agree of 2 quantities"
    assert (
        lines[1] == "  agree: grad input 0 in float64: words about grad input 0 (0.7 x the bound)"
    )
    assert lines[2:5] == [f"  not compared: {note}" for note in "abc"]
    assert one.notes == ("a", "b", "c", "d")


def test_the_departure_is_told() -> None:
    apart = Departure(5, "update weight", "float32", 3.0)
    one = Report((found(kind=Verdict.JAX_WORSE, side="jax"),), departure=apart)
    assert "  first apart: update weight after step 5, in float32" in str(one).splitlines()
    assert "first apart" not in str(one._replace(departure=None))


@pytest.mark.parametrize(
    ("name", "factor"),
    [("output", 5.0), ("output[0]", 3.0), ("grad input 0", 7.0), ("grad weight", 1.0)],
)
def test_the_widest_tolerance_that_matches_counts(name: str, factor: float) -> None:
    rows = (
        Tolerance("output*", 3.0, "a"),
        Tolerance("output", 5.0, "b"),
        Tolerance("grad input ?", 7.0, "c"),
    )
    assert factor_of(name, rows) == factor


def test_tolerances_are_checked_one_by_one() -> None:
    good = Tolerance("*", 2.0, "why")
    check_tolerances((good, good))
    assert "must widen the bound" in refusal(
        lambda: check_tolerances((good, good._replace(factor=1.0)))
    )
    assert "must give its reason" in refusal(
        lambda: check_tolerances((good, good._replace(reason="\n")))
    )
