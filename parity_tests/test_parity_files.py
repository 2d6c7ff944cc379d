"""Reports as files: whole, read back exactly, and refused with the place if they are not ours."""

import json
import math
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from flaxstab import parity
from flaxstab.parity import Case, Departure, Finding, Report, Session, Tolerance, Verdict
from flaxstab.parity._layers import LayerError, Location
from flaxstab.parity._session import FORMAT, SCHEMA
from parity_tests.support.pairs import refusal

FINDINGS = (
    Finding("output", Verdict.AGREE, "float64", 1 / 3, 0.1, 1e-12, 'words "quoted" \N{SNOWMAN}'),
    Finding("grad a", Verdict.SEMANTICS_DIFFER, "float64", math.inf, math.inf, 1e-12, "NaN", "jax"),
    Finding("grad b", Verdict.JAX_WORSE, "float32", np.float64(5e-324), np.float32(0.1), 2.0, ""),
)
LAYERS = (
    LayerError("a.b", "forward", 0.5, 3.0, False, "inherited", "output"),
    LayerError("c", "backward", math.inf, 1e300, True, "own"),
)
REPORT = Report(
    FINDINGS,
    ("a note",),
    (Tolerance("*", 2.0, "a reason"),),
    Departure(3, "loss", "float32", 1.5),
    ("softmax",),
)
LOCATION = Location(LAYERS, "c", "backward", ("d was not called",))
SESSION = Session(
    (
        Case("t.py::a", REPORT, location=LOCATION),
        Case("t.py::b", None, "cannot run"),
        Case("c", Report(())),
    ),
    {"packages": {"jax": "1", "torch": None}, "settings": {}},
    "mine",
)


def written(folder: Path, change: object = None, name: str = "r.json") -> Path:
    """Returns a session's file; ``change`` takes what it holds and changes it in place."""
    path = parity.write_report(SESSION, folder / name)
    if callable(change):
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))
    return path


def test_a_report_is_read_back_exactly(tmp_path: Path) -> None:
    path = parity.write_report(REPORT, tmp_path / "r.json")
    assert parity.read_report(path) == REPORT
    assert type(parity.read_report(path).findings[0].verdict) is Verdict


def test_a_session_is_read_back_exactly(tmp_path: Path) -> None:
    assert parity.read_session(written(tmp_path)) == SESSION


def test_a_file_keeps_the_layers_that_a_report_found(tmp_path: Path) -> None:
    looked = REPORT._replace(where=lambda: LOCATION)
    path = parity.write_report(looked, tmp_path / "r.json")
    assert parity.read_session(path).cases[0].location == LOCATION
    assert parity.read_report(path) == looked._replace(where=None)
    given = parity.write_report(looked, path, location=LOCATION._replace(first="x"))
    assert parity.read_session(given).cases[0].location.first == "x"


def test_nan_is_read_back_as_nan(tmp_path: Path) -> None:
    nan = FINDINGS[0]._replace(jax_error=math.nan, torch_error=-math.inf)
    path = parity.write_report(Report((nan,)), tmp_path / "r.json")
    (found,) = parity.read_report(path).findings
    assert math.isnan(found.jax_error)
    assert found.torch_error == -math.inf


def test_the_file_is_strict_json_that_tells_other_programs_the_verdict(tmp_path: Path) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    held = json.loads(written(tmp_path).read_text(), parse_constant=refuse)  # no NaN, no Infinity
    assert (held["format"], held["schema"]) == (FORMAT, SCHEMA)
    assert (held["passed"], held["verdict"]) == (False, "2 of 3 comparisons fail")
    told = [(case["passed"], case["verdict"]) for case in held["cases"]]
    assert told == [(False, "semantics_differ"), (False, "not compared"), (True, "agree")]


def test_a_file_tells_its_environment_without_being_told(tmp_path: Path) -> None:
    environment = parity.read_session(parity.write_report(REPORT, tmp_path / "r.json")).environment
    assert {"jax", "flax", "torch"} <= set(environment["packages"])


def test_a_field_more_is_a_schema_more() -> None:
    """Who adds a field must count SCHEMA up: an older flaxstab refuses what it does not know."""
    kinds = (Session, Case, Report, Finding, Tolerance, Departure, Location, LayerError)
    fields = {kind.__name__: [n for n in get_type_hints(kind) if n != "where"] for kind in kinds}
    assert {SCHEMA: fields} == {
        1: {
            "Session": ["cases", "environment", "title"],
            "Case": ["name", "report", "words", "location", "reproducer"],
            "Report": ["findings", "notes", "tolerances", "departure", "pinned"],
            "Finding": [
                "name", "verdict", "dtype", "jax_error", "torch_error", "bound", "explanation",
                "side",
            ],
            "Tolerance": ["pattern", "factor", "reason"],
            "Departure": ["step", "name", "dtype", "excess"],
            "Location": ["layers", "first", "direction", "notes"],
            "LayerError": ["name", "direction", "own", "inherited", "differs", "kind", "note"],
        }
    }  # fmt: skip


REFUSALS = {
    "newer": (lambda h: h.update(schema=SCHEMA + 1), "pip install -U flaxstab"),
    "no schema": (lambda h: h.pop("schema"), "r.json: schema must be an integer of at least 1"),
    "true schema": (lambda h: h.update(schema=True), "schema must be an integer"),
    "foreign": (lambda h: h.update(format="other"), "r.json must be of format"),
    "no cases": (lambda h: h.pop("cases"), "r.json must be an object with cases"),
    "cases no list": (lambda h: h.update(cases={}), "r.json.cases must be a list, got {}"),
    "a case no object": (lambda h: h.update(cases=[1]), "cases[0] must be an object, got 1"),
    "a word for a number": (
        lambda h: h["cases"][0]["report"]["findings"][1].update(bound="wide"),
        "r.json.cases[0].report.findings[1].bound must be a number, got 'wide'",
    ),
    "a bool for a number": (
        lambda h: h["cases"][0]["report"]["findings"][1].update(bound=True), "must be a number",
    ),
    "a number for a word": (
        lambda h: h["cases"][0].update(name=3), "cases[0].name must be a string, got 3",
    ),
    "an unknown verdict": (
        lambda h: h["cases"][0]["report"]["findings"][0].update(verdict="fine"),
        "findings[0].verdict must be one of ['agree', ",
    ),
    "an unknown side": (
        lambda h: h["cases"][0]["report"]["findings"][0].update(side="us"), ".side must be one of",
    ),
    "a step of 2.5": (
        lambda h: h["cases"][0]["report"]["departure"].update(step=2.5), "must be an integer",
    ),
    "a truth of 1": (
        lambda h: h["cases"][0]["location"]["layers"][0].update(differs=1), "true or false, got 1",
    ),
    "an absent part": (
        lambda h: h["cases"][0]["report"]["findings"][0].pop("dtype"),
        "findings[0] must be an object with dtype",
    ),
    "an unknown part": (
        lambda h: h["cases"][0]["report"].update(colour="red"), "alone, got ['colour']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSALS, ids=str)
def test_a_file_that_is_not_ours_is_refused_with_the_place(tmp_path: Path, row: str) -> None:
    change, words = REFUSALS[row]
    path = written(tmp_path, change)
    assert words in refusal(lambda: parity.read_session(path))


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes().rstrip()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        words = refusal(lambda: parity.read_session(path))
        assert "r.json must be a whole JSON file, got " in words
        assert "line " in words
        assert words.endswith("Write it again.")


@pytest.mark.parametrize("held", [b"\xff\xfe", b"[" * 100_000, b"3", b"null", b"[]", b"{}"])
def test_any_other_bytes_are_refused(tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(held)
    assert "r.json must be " in refusal(lambda: parity.read_session(path))


def test_an_absent_or_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    assert "must be there" in refusal(lambda: parity.read_report(tmp_path / "no.json"))
    assert "must be there" in refusal(lambda: parity.read_report(tmp_path))
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    assert "bytes at most" in refusal(lambda: parity.read_report(huge))


def test_a_session_is_not_read_as_a_report(tmp_path: Path) -> None:
    words = refusal(lambda: parity.read_report(written(tmp_path)))
    assert words == (
        "the file must hold one case, got cases=3. Read them with parity.read_session."
    )
    alone = parity.write_report(Session((Case("b", None, "cannot run"),)), tmp_path / "b.json")
    assert "could not be compared: cannot run" in refusal(lambda: parity.read_report(alone))


@pytest.mark.parametrize("name", ["r", "r.xml", "r.json.gz", ".json"])
def test_another_ending_is_refused_and_nothing_written(tmp_path: Path, name: str) -> None:
    words = refusal(lambda: parity.write_report(REPORT, tmp_path / name))
    assert "must end in .json, .html, .txt" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["json", "html", "txt", "HTML"])
def test_a_failed_write_leaves_the_old_file_as_it_was(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"r.{ending}"
    parity.write_report(REPORT, path)
    old = path.read_bytes()

    def full(self: Path, *_: object, **__: object) -> None:
        with self.open("w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        parity.write_report(SESSION, path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = refusal(lambda: parity.write_report(REPORT, tmp_path / "no" / "r.json"))
    assert str(tmp_path / "no") in words
