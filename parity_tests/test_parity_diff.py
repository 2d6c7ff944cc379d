"""What a diff of two baselines says: planted moves, streams, names; nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from flaxstab.parity import Outcome, diff
from flaxstab.parity._diff import CaseDiff, Diff, Effect
from flaxstab.parity._diff._files import page, write_html, write_json
from flaxstab.parity._record import Baseline, Record
from flaxstab.parity._record._baseline import Mark, Signature
from flaxstab.parity._record._fold import folded, folded_unit
from flaxstab.parity._report_screen import as_text
from flaxstab.parity._verdict import SEMANTICS, Verdict
from parity_tests.support.baselines import (
    EPS32,
    baseline,
    changed,
    drawn,
    low,
    record,
    values,
    with_facts,
)

SIDES = ("jax", "torch")


def only(found: Diff) -> CaseDiff:
    (case,) = found.cases
    return case


def moved(side: str, precision: str, by: float) -> Baseline:
    group = values() if precision == "float64" else low(values())
    return baseline(layer=record(**{f"{side}_{precision}": changed(group, "output", by)}))


def test_equal_baselines_are_safe() -> None:
    found = diff(baseline(), baseline())
    assert found.verdict is Outcome.SAFE
    assert only(found).effect is Effect.SAME
    assert only(found).compared == 12
    assert all(only(found).square)
    assert (found.settings, found.names, found.streams) == ((), (), ())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_one_ulp_on_one_side_is_harmless_and_shown(side: str, precision: str) -> None:
    ulp = float(np.finfo(precision).eps)
    found = diff(baseline(), moved(side, precision, ulp))
    assert found.verdict is Outcome.SAFE
    assert (only(found).effect, only(found).mover) == (Effect.ROUNDING, side)
    (move,) = only(found).moves
    assert (move.name, move.precision, move.side) == ("output", precision, side)
    assert 0 < move.size <= 2


@pytest.mark.parametrize("side", SIDES)
def test_a_change_of_meaning_breaks_and_names_side_and_pairs(side: str) -> None:
    found = diff(baseline(), moved(side, "float64", 1e-3))
    assert found.verdict is Outcome.BREAKS
    case = only(found)
    assert (case.effect, case.mover) == (Effect.MEANING, side)
    assert case.moves[0].name == "output"
    assert case.square.old_old
    assert not case.square.new_new
    assert (case.square.new_old, case.square.old_new) == ((False, True), (True, False))[
        side == "torch"
    ]


def test_the_bound_in_float64_is_1e_12_of_the_magnitude() -> None:
    size = float(np.max(np.abs(values()["output"])))
    element = float(values()["output"].flat[5])
    for factor, effect in ((0.5, Effect.ROUNDING), (2.0, Effect.MEANING)):
        by = factor * SEMANTICS * size / element
        assert only(diff(baseline(), moved("jax", "float64", by))).effect is effect


@pytest.mark.parametrize("side", SIDES)
def test_a_larger_error_in_float32_breaks_unless_the_comparison_allows_it(side: str) -> None:
    new = moved(side, "float32", 400 * EPS32)
    found = diff(baseline(), new)
    assert (only(found).effect, only(found).mover) == (Effect.WORSE, side)
    assert found.verdict is Outcome.BREAKS
    # The comparison in the new environment knows of the error and takes it: the other side's too.
    case = new.cases["layer"]
    errors = tuple(e._replace(jax=400.0, torch=400.0) for e in case.facts.errors)
    allowed = diff(baseline(), baseline(layer=with_facts(case, errors=errors)))
    assert (only(allowed).effect, allowed.verdict) == (Effect.LARGER, Outcome.CHANGES)


def test_a_change_of_meaning_is_told_once_not_in_every_precision() -> None:
    by = 1e-3
    new = record(
        jax_float64=changed(values(), "output", by),
        jax_float32=low(changed(values(), "output", by)),
    )
    moves = only(diff(baseline(), baseline(layer=new))).moves
    assert [(m.name, m.precision) for m in moves] == [("output", "float64")]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (values()["output"].astype(np.float32), "dtypes"),
        (values()["output"].T, "shapes"),
        (np.where(np.arange(12).reshape(4, 3) == 5, np.nan, values()["output"]), "NaN"),
    ],
)
def test_dtype_shape_and_places_of_nan_are_meaning(array: np.ndarray, words: str) -> None:
    new = record(jax_float64={**values(), "output": array})
    case = only(diff(baseline(), baseline(layer=new)))
    assert case.effect is Effect.MEANING
    assert words in case.words


def test_a_quantity_that_is_gone_is_meaning_and_a_new_one_is_not() -> None:
    exact = values()
    fewer = {n: a for n, a in exact.items() if n != "evaluation"}
    new = record(jax_float64=fewer, torch_float64=fewer)
    units = {n: {k: u for k, u in g.items() if k in fewer} for n, g in new.units.items()}
    case = only(diff(baseline(), baseline(layer=new._replace(units=units))))
    assert (case.effect, case.mover) == (Effect.MEANING, "both")
    back = only(diff(baseline(layer=new._replace(units=units)), baseline()))
    assert back.effect is Effect.NEW


def test_another_random_stream_is_no_other_mathematics() -> None:
    old = with_facts(record(), draws=drawn("a"))
    new = record(jax_float64=changed(values(), "output", 0.5))
    new = with_facts(new, draws=drawn("b"))
    found = diff(baseline(layer=old), baseline(layer=new))
    assert (only(found).effect, found.verdict) == (Effect.STREAM, Outcome.CHANGES)
    assert only(found).square.new_old is None  # other draws: not comparable
    assert "other numbers" in only(found).words


def test_evaluation_draws_nothing_and_is_compared_all_the_same() -> None:
    old = with_facts(record(), draws=drawn("a"))
    new = record(jax_float64=changed(values(), "evaluation", 1e-3))
    found = diff(baseline(layer=old), baseline(layer=with_facts(new, draws=drawn("b"))))
    assert (only(found).effect, only(found).moves[0].name) == (Effect.MEANING, "evaluation")


def test_given_equal_draws_the_new_comparison_judges_the_mathematics() -> None:
    old, new = (with_facts(record(), draws=drawn(word)) for word in "ab")
    wrong = new.facts.findings[0]._replace(verdict=Verdict.SEMANTICS_DIFFER, side="jax")
    new = with_facts(new, findings=(wrong, *new.facts.findings[1:]))
    found = diff(baseline(layer=old), baseline(layer=new))
    assert only(found).effect is Effect.MEANING
    assert "agreed and do not now" in only(found).words


def test_a_stream_has_changed_only_if_its_draws_have() -> None:
    old = baseline()
    normal = old.streams["jax.random.normal"]
    rounded = old._replace(streams={"jax.random.normal": normal * np.float32(1 + EPS32)})
    other = old._replace(streams={"jax.random.normal": normal[::-1].copy()})
    gone = old._replace(streams={}, failures=(Mark("jax.random.normal", "it is gone"),))
    for new, effect, verdict in (
        (rounded, Effect.ROUNDING, Outcome.SAFE),
        (other, Effect.STREAM, Outcome.CHANGES),
        (gone, Effect.GONE, Outcome.CHANGES),
    ):
        found = diff(old, new)
        assert [s.effect for s in found.streams] == [effect]
        assert found.verdict is verdict
        assert only(found).effect is Effect.SAME  # and nothing is said of the mathematics


@pytest.mark.parametrize(
    ("parameters", "change", "verdict"),
    [
        (("features", "eps=1e-06", "affine=True"), "default", Outcome.CHANGES),
        (("features", "affine=True"), "parameter gone", Outcome.CHANGES),
        (("features", "affine=True", "eps=1e-05"), "order", Outcome.CHANGES),
        (("features", "size", "eps=1e-05", "affine=True"), "default", Outcome.CHANGES),
        (("features", "eps=1e-05", "affine=True", "bias=True"), "parameter new", Outcome.SAFE),
    ],
)
def test_public_names_and_defaults(
    parameters: tuple[str, ...], change: str, verdict: Outcome
) -> None:
    old = baseline()
    new = old._replace(surface=(old.surface[0], Signature("torch.nn.Norm", parameters)))
    found = diff(old, new)
    assert found.names[0].name == "torch.nn.Norm"
    assert change in [name.change for name in found.names]
    assert found.verdict is verdict


def test_names_that_are_gone_or_new() -> None:
    old = baseline()
    more = (*old.surface, Signature("torch.nn.Other", ()))
    assert diff(old, old._replace(surface=more)).verdict is Outcome.SAFE
    back = diff(old._replace(surface=more), old)
    assert [(n.name, n.change) for n in back.names] == [("torch.nn.Other", "gone")]
    assert back.verdict is Outcome.CHANGES
    (whole,) = diff(old, old._replace(surface=old.surface[:1])).names
    assert "torch.nn" in whole.name
    assert "cannot be imported: 1 names" in whole.words


def error() -> Record:
    return with_facts(Record(record().facts), kind="none", error="ImportError: no such name")


def test_a_case_that_fails_now_breaks_and_one_that_ran_never_does_not() -> None:
    found = diff(baseline(a=record(), b=record()), baseline(a=record(), b=error()))
    assert (found.cases[0].name, found.cases[0].effect) == ("b", Effect.FAILS)
    assert found.verdict is Outcome.BREAKS
    assert "ImportError: no such name" in str(found)
    both = diff(baseline(a=record(), b=error()), baseline(a=record(), b=error()))
    assert both.verdict is Outcome.SAFE
    assert {c.name: c.effect for c in both.cases} == {"a": Effect.SAME, "b": Effect.NEITHER}
    assert "1 runs in neither, 1 same" in both.headline
    alone = diff(baseline(a=error()), baseline(a=error()))
    assert alone.verdict is Outcome.CHANGES
    assert "1 case that runs in neither: a" in as_text(alone)


def test_what_is_common_is_compared_and_the_rest_is_listed() -> None:
    found = diff(baseline(a=record(), b=record()), baseline(b=record(), c=record()))
    assert {c.name: c.effect for c in found.cases} == {
        "a": Effect.GONE, "b": Effect.SAME, "c": Effect.NEW,
    }  # fmt: skip
    assert found.verdict is Outcome.CHANGES


def test_cases_from_other_inputs_or_weights_are_not_compared() -> None:
    other = record()._replace(inputs={"input 0": np.zeros((4, 3))})
    heavy = record()._replace(weights={"weight": np.zeros(3, np.float32)})
    old = baseline(a=record(), b=record(), c=record())
    found = diff(old, baseline(a=other, b=heavy, c=record()))
    assert [c.effect for c in found.cases] == [Effect.APART, Effect.APART, Effect.SAME]
    assert "--inputs-from OLD" in found.cases[0].words


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (baseline(b=record()), "case in common"),
        (baseline(a=record()._replace(inputs={})), "from equal inputs"),
    ],
)
def test_nothing_to_compare_is_refused_with_the_fix(new: Baseline, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        diff(baseline(a=record()), new)
    assert "Record" in str(refused.value)


def test_one_moved_element_of_a_large_array_shows_in_its_sums() -> None:
    large = np.random.default_rng(0).normal(3.0, 2.0, (300, 300))
    unit = folded_unit(np.asarray(np.max(large)), large.size)

    def made(array: np.ndarray) -> Baseline:
        kept, hashes = folded({"output": array})
        case = record(jax_float64={**values(), **kept}, torch_float64={**values(), **kept})
        units = {**case.units, "float64": {**case.units["float64"], "output": unit}}
        marks = tuple(Mark(f"{s} float64 {n}", w) for s in SIDES for n, w in hashes.items())
        return baseline(layer=with_facts(case._replace(units=units), hashes=marks))

    def effect(new: np.ndarray) -> Effect:
        return only(diff(made(large), made(new))).effect

    assert effect(large) is Effect.SAME
    signs = np.random.default_rng(1).choice([-1.0, 1.0], large.shape)
    assert effect(large * (1 + SEMANTICS / 4 * signs)) is Effect.ROUNDING
    one = large.copy()
    one[123, 45] *= 1 + 1e-6
    assert effect(one) is Effect.MEANING


def test_the_screen_shows_the_worst_first_and_fits() -> None:
    worse = record(jax_float64=changed(values(), "output", 1e-3))
    bits = record(torch_float32=changed(low(values()), "output", EPS32))
    many = {f"case {i}": bits for i in range(40)}
    old = baseline(**dict.fromkeys(many, record()), bad=record())
    found = diff(old, baseline(**many, bad=worse))
    text = as_text(found)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("breaks: of 41 cases 1 mathematics changed, 40 rounding moved")
    (header,) = (i for i, line in enumerate(lines) if "x bound" in line)
    assert lines[header + 1].startswith("bad")
    assert "more cases" in text


def test_a_recorded_side_is_labelled() -> None:
    new = with_facts(record(), torch="recorded")
    environment = {"packages": {"jax": "0.12.0"}}
    made = baseline(layer=new)._replace(
        torch="recorded", environment=environment, torch_environment=baseline().environment
    )
    found = diff(baseline(), made)
    assert found.torch == "recorded"
    assert [s.name for s in found.settings] == ["jax"]  # torch's absence is no change of torch
    assert "is recorded 2.13.0" in str(found)
    assert "recorded" in page(found)


def test_json_and_html_hold_all_of_it(tmp_path: Path) -> None:
    found = diff(baseline(), moved("jax", "float64", 1e-3))
    held = json.loads(write_json(found, tmp_path / "diff.json").read_text())
    assert (held["format"], held["schema"]) == ("flaxstab.parity.diff", 1)
    assert held["verdict"] == "breaks"
    (case,) = held["cases"]
    assert (case["name"], case["mover"]) == ("layer", "jax")
    assert case["moves"][0]["side"] == "jax"
    assert case["square"] == {"old_old": 1, "new_old": 0, "old_new": 1, "new_new": 0}
    text = write_html(found, tmp_path / "diff.html").read_text()
    assert "mathematics changed" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
