"""What a diff did not compare is said; nothing that is printed is cut off."""

import numpy as np
import pytest

from flaxstab.parity import Outcome, diff
from flaxstab.parity._diff import Diff, Effect
from flaxstab.parity._record import Record
from flaxstab.parity._report_screen import as_text
from parity_tests.support.baselines import baseline, changed, record, values


def without(precision: str) -> Record:
    made = record()
    held = {n: g for n, g in made.values.items() if not n.endswith(precision)}
    units = {n: g for n, g in made.units.items() if n != precision}
    return made._replace(values=held, units=units)


def test_no_common_precision_is_not_the_same() -> None:
    found = diff(baseline(layer=without("float64")), baseline(layer=without("float32")))
    (case,) = found.cases
    assert (case.effect, case.compared) == (Effect.EMPTY, 0)
    assert [*case.square] == [None, None, None, None] or not any(case.square)
    assert found.verdict is Outcome.CHANGES
    assert "1 not compared" in found.headline


def test_records_without_values_are_not_the_same() -> None:
    none = record()._replace(values={"jax float64": {}, "torch float64": {}}, units={"float64": {}})
    (case,) = diff(baseline(layer=none), baseline(layer=none)).cases
    assert case.effect is Effect.EMPTY
    assert "no value of it in a common precision" in case.words
    assert [*case.square] == [None] * 4


@pytest.mark.parametrize("side", ["OLD", "NEW"])
def test_a_precision_that_one_file_has_is_reported(side: str) -> None:
    both = [baseline(layer=record()), baseline(layer=without("float32"))]
    found = diff(*(both if side == "OLD" else both[::-1]))
    (case,) = found.cases
    (move,) = case.moves
    assert (case.effect, case.mover, found.verdict) == (Effect.EMPTY, "", Outcome.CHANGES)
    assert (move.precision, move.words) == ("float32", f"only {side} has this precision")


def printed(found: Diff) -> str:
    text = as_text(found)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    return " ".join(text.split())


def test_nothing_is_cut_off_at_80_columns() -> None:
    old = {f"case {i}": record() for i in range(57)}
    worse = record(jax_float64=changed(values(), "output", 1e-3))
    found = diff(baseline(**old), baseline(**{**old, "case 0": worse}))
    text = printed(found)
    pairs = "old-old 57/57, old-new 57/57, new-old 56/57, new-new 56/57"
    assert pairs in text
    (move,) = found.cases[0].moves
    assert move.words.split()[-1] in text


def test_short_names_do_not_cut_the_header_and_one_is_singular() -> None:
    worse = record(jax_float64=changed(values(), "output", 1e-3))
    found = diff(baseline(a=record(), b=record()), baseline(a=worse))
    lines = as_text(found).splitlines()
    assert any(line.startswith("case ") for line in lines)
    assert "  1 case gone: b" in [line.rstrip() for line in lines]
    assert diff(baseline(), baseline()).headline == "safe: of 1 case 1 same"


def test_files_of_other_cases_are_named_with_what_they_hold() -> None:
    many = {f"c{i}": record()._replace(inputs={"x": np.zeros(1)}) for i in range(5)}
    words = r"got 'a' in a baseline and 'c0', 'c1', 'c2', \.\.\. \(5\) in a baseline\. Record the"
    with pytest.raises(ValueError, match=words):
        diff(baseline(a=record()), baseline(**many))
