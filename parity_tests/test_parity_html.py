"""The HTML page and the terminal's screen: whole, escaped, without network, the gravest first."""

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rich
from rich.console import Console

from flaxstab import parity
from flaxstab.parity import Case, Departure, Finding, Report, Session, Tolerance, Verdict
from flaxstab.parity._html import Bars, Section, Table, Text, page
from flaxstab.parity._layers import LayerError, Location
from parity_tests.support.pairs import refusal

EVIL = "<script>alert(1)</script><img src=x onerror='y'>\"'& \x00\x1b[31m\ud800 \N{SNOWMAN}"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Read(HTMLParser):
    """Reads a page strictly: every tag is closed in turn; keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def found(name: str, kind: Verdict = Verdict.AGREE, dtype: str = "float64", error: float = 0.5,
          side: str = "") -> Finding:  # fmt: skip
    return Finding(name, kind, dtype, error, 0.0, 1.0, f"words about {name}", side)


def many(n: int = 100) -> Report:
    findings = [
        found(f"grad layer{i}.weight", Verdict.SEMANTICS_DIFFER, error=2.0 + i) for i in range(n)
    ]
    findings += [found(f"fine {i}") for i in range(n)]
    notes = tuple(f"note {i}" for i in range(50))
    tolerances = (Tolerance("output", 2.0, "a reason"),)
    return Report(
        tuple(findings), notes, tolerances, Departure(3, "loss", "float64", 2.0), ("pin",)
    )


def full_page() -> str:
    table = Table([EVIL, "n"], [[EVIL, 3], ["b", 0.5]], ["bad", "good"])
    bars = Bars([EVIL, "b"], [2.0, math.nan], EVIL, others=[1.0, math.inf], others_title=EVIL)
    bodies = (Text(EVIL), Text(EVIL, code=True), table, bars)
    return page(EVIL, EVIL, [Section(EVIL, bodies), Section(EVIL, bars, folded=True)], state="bad")


def test_a_page_is_whole_and_everything_in_it_escaped() -> None:
    read = Read(full_page())
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "form"}
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert "<script>alert(1)</script>" in read.text  # as text
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", full_page())
    assert "\N{SNOWMAN}" in read.text


def test_a_page_needs_no_network_and_no_script() -> None:
    text = full_page()
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    names = {name for _, attrs in Read(text).tags for name in attrs}
    assert not names & {"src", "href", "srcset", "data", "action"}
    assert "default-src 'none'" in text  # a browser refuses what slipped through


def test_a_page_is_readable_in_light_and_dark() -> None:
    text = full_page()
    assert '<meta name="color-scheme" content="light dark">' in text
    (dark,) = re.findall(r"prefers-color-scheme: dark\) \{ :root \{(.*?)\}", text, re.DOTALL)
    (light,) = re.findall(r":root \{ color-scheme: light dark;(.*?)\}", text, re.DOTALL)
    colours = [dict(re.findall(r"--(\w+): (#\w+)", part)) for part in (light, dark)]
    assert colours[0].keys() == colours[1].keys()
    for colour in colours:
        for name in ("ink", "soft", "good", "bad", "mixed"):  # of text, as WCAG 2 AA demands
            assert contrast(colour[name], colour["paper"]) >= 4.5
            assert contrast(colour[name], colour["panel"]) >= 4.5
        assert contrast(colour["bar"], colour["paper"]) >= 3


def contrast(one: str, other: str) -> float:
    """Returns the contrast of two colours as WCAG 2 defines it."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted([light(one), light(other)])
    return (high + 0.05) / (low + 0.05)


def test_a_chart_says_itself_to_who_cannot_see_it() -> None:
    bars = Bars(["a", "b", "c"], [0.5, 3.0, 2.0], "error", excused=[False, False, True])
    read = Read(page("t", "v", [Section("s", bars)]))
    (attrs,) = [attrs for tag, attrs in read.tags if tag == "svg"]
    assert attrs["role"] == "img"
    assert attrs["aria-label"] == "error of 3 items; the largest is 3, of b; 1 beyond 1"
    cells = [tag for tag, _ in read.tags if tag == "td"]
    assert len(cells) == 6  # and the numbers as a table
    assert read.text.count("\N{BLACK LEFT-POINTING TRIANGLE}") == 1  # not by colour alone


def test_bars_are_as_long_as_the_logarithm_of_their_values() -> None:
    values = [1e-3, 1e-1, 1e1, 0.0, math.inf]
    read = Read(page("t", "v", [Section("s", Bars([*"abcde"], values, "error"))]))
    bars = [attrs for tag, attrs in read.tags if tag == "rect"]
    long = [float(str(attrs["width"])) for attrs in bars]
    assert long[2] - long[1] == pytest.approx(long[1] - long[0], abs=0.2)
    assert long[0] > 0 == long[3]
    assert long[4] == max(long) > long[2]
    assert [attrs["class"] for attrs in bars] == ["within", "within", "beyond", "within", "beyond"]


@pytest.mark.parametrize(
    "values", [[], [0.0], [math.nan], [math.inf], [1e-300, 1e300], [1.0] * 500]
)
def test_any_numbers_make_a_chart(values: list[float]) -> None:
    text = page("t", "v", [Section("s", Bars([f"n{i}" for i in range(len(values))], values))])
    sizes = [float(str(a["width"])) for tag, a in Read(text).tags if tag == "rect"]
    assert len(sizes) == len(values)
    assert all(0 <= size <= 560 for size in sizes)
    assert len(re.findall('class="tick"', text)) <= 14


def test_what_does_not_fit_together_is_refused() -> None:
    rows = (
        (
            lambda: Bars(["a"], []),
            "there must be a value for each label, got labels=1 and values=0.",
        ),
        (lambda: Bars(["a"], [-1.0]), "values must be at least 0, got values=[-1.0]."),
        (lambda: Bars(["a"], [1.0], others=[1.0, 2.0]), "another value for each label, or none"),
        (lambda: Bars(["a"], [1.0], excused=[True, True]), "an excuse for each label, or none"),
        (lambda: Table(["a"], [[1, 2]]), "every row must have a cell for each header"),
        (lambda: Table(["a"], [[1]], ["good", "bad"]), "every row must have a state, or none"),
        (lambda: Table(["a"], [[1]], ["fine"]), "states must be of "),
        (lambda: page("t", "v", [], state="fine"), "state must be of "),
    )
    for make, words in rows:
        assert words in refusal(make)


def page_of(tmp_path: Path, what: Report | Session, **more: object) -> str:
    return parity.write_report(what, tmp_path / "r.html", **more).read_text()


def test_the_page_of_a_report_has_the_verdict_on_top_and_failures_first(tmp_path: Path) -> None:
    text = Read(page_of(tmp_path, many(), title="My port")).text
    places = [
        text.index(words)
        for words in (
            "My port",
            "semantics_differ: 100 ",
            "grad layer0.weight",
            "fine 0",
            "Environment",
        )
    ]
    assert places == sorted(places)
    for words in ("after step 3", "Not compared: note 49", "Widened: output x2, because a reason",
                  "Computes in less than float64: pin", "packages.jax"):  # fmt: skip
        assert words in text


def test_the_page_of_a_session_has_failing_cases_first(tmp_path: Path) -> None:
    agrees, worse = (
        Report((found("a"),)),
        Report((found("b", Verdict.JAX_WORSE, "float32", 3.0, "jax"),)),
    )
    cases = (
        Case("passes", agrees), Case("worse", worse, reproducer="r/worse.py"),
        Case("differs", many()), Case("refused", None, "cannot run"), Case("empty", Report(())),
    )  # fmt: skip
    session = Session(cases)
    assert [case.name for case in session.sorted()] == [
        "refused", "differs", "worse", "passes", "empty",
    ]  # fmt: skip
    text = Read(page_of(tmp_path, session)).text
    assert "3 of 5 comparisons fail" in text
    places = [
        text.index(w) for w in ("refused: not compared", "Failures of differs", "Failures of worse")
    ]
    assert places == sorted(places)
    assert "As a script, r/worse.py" in text
    assert "of passes" not in text


def test_a_page_of_a_thousand_tests_stays_small(tmp_path: Path) -> None:
    cases = [
        Case(f"test_{i}", many(20)._replace(findings=(found("a"),) * 200)) for i in range(1000)
    ]
    assert len(page_of(tmp_path, Session(tuple(cases)))) < 500_000


def test_each_layer_has_a_bar_forward_and_backward(tmp_path: Path) -> None:
    layers = [LayerError(f"layer{i}", "forward", 0.1, 0.1, False) for i in range(160)]
    layers[7] = layers[7]._replace(own=5.0, differs=True, kind="own")
    layers += [LayerError("layer9", "backward", 0.5, 7.0, False, "inherited")]
    layers += [LayerError("layer3", "backward", math.nan, 1.0, False, "unknown", "was not called")]
    where = Location(tuple(layers), "layer7", "forward", ("a note",))
    read = Read(page_of(tmp_path, many(2), location=where))
    said = [str(attrs["aria-label"]) for tag, attrs in read.tags if tag == "svg"]
    assert said[0].startswith("forward: a layer's own error over its bound of 160 items")
    assert said[0].endswith("the largest is 5, of layer7; 1 beyond 1")
    assert said[1].startswith("backward: a layer's own error over its bound of 1 items")
    for words in (
        "The first layer that differs: layer7 (forward",
        "was not called",
        "Not judged: a note",
    ):
        assert words in read.text


def screen(what: object, width: int = 80, height: int = 24) -> list[str]:
    """Returns the lines that a terminal of this size shows."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    with console.capture() as captured:
        console.print(what)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
    return plain.splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (200, 50), (80, 12)])
def test_a_terminal_shows_one_screen_the_gravest_first(width: int, height: int) -> None:
    report = many()._replace(notes=("a note",), tolerances=())
    cases = tuple(Case(f"test_file.py::test_{i}", report) for i in range(50))
    for what, first, last in (
        (report, "semantics_differ: 100 ", "a note"),
        (
            Session((Case("fine", Report((found("x"),))), *cases)),
            "50 of 51 comparisons fail",
            "more",
        ),
    ):
        lines = screen(what, width, height)
        assert len(lines) <= min(height, 24) - 1
        assert all(len(line) <= width for line in lines)
        assert lines[0].startswith(first)
        assert last in lines[-1]
    assert "... and " in "\n".join(screen(report, width, height))


def test_a_terminal_shows_all_of_a_small_report() -> None:
    two = Report((found("a", Verdict.SEMANTICS_DIFFER, error=3.0), found("b"),
                  found("c", Verdict.JAX_WORSE, "float32", 2.0, "jax")))  # fmt: skip
    text = " ".join(" ".join(screen(two)).split())
    assert "a float64 3 semantics_differ: words about a" in text
    assert "c float32 2 jax_worse, jax: words about c" in text
    assert "words about b" not in text
    assert "... and" not in text


def test_markup_in_a_name_is_shown_as_it_is() -> None:
    odd = Report((found("[red]x[/]\x1b[2J", Verdict.SEMANTICS_DIFFER, error=2.0),))
    assert "[red]x[/]" in "\n".join(screen(odd))
    assert any("[red]x[/]" in line for line in screen(Session((Case("[b]", odd),))))
    assert "\x1b[2J" not in "\n".join(screen(odd))  # it would clear the screen


def test_rich_prints_a_report_and_text_has_no_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich.print(many())
    assert "semantics_differ: 100" in capsys.readouterr().out
    text = parity.write_report(many(), tmp_path / "r.txt").read_text()
    assert "\x1b" not in text
    assert text.startswith("semantics_differ: 100")
    alone = parity.write_report(Session((Case("n", None, "cannot run"),)), tmp_path / "n.txt")
    assert "cannot run" in alone.read_text()
    empty = parity.write_report(Session(()), tmp_path / "e.txt").read_text()
    assert empty.strip() == "nothing was compared"
