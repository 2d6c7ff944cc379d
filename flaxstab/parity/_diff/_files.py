"""A difference of two baselines as JSON with a versioned schema, and as one HTML page."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flaxstab._files import write_whole
from flaxstab.parity import _html
from flaxstab.parity._diff._screen import environment, excess, square
from flaxstab.parity._diff._types import BREAKING, CHANGING, CaseDiff, Effect, Outcome
from flaxstab.parity._plain import to_plain

if TYPE_CHECKING:
    from flaxstab.parity._diff._diff import Diff

FORMAT, SCHEMA = "flaxstab.parity.diff", 1
_STATES: dict[Outcome, _html.State] = {
    Outcome.SAFE: "good", Outcome.CHANGES: "mixed", Outcome.BREAKS: "bad",
}  # fmt: skip
_SHOWN = 60  # moves of a case


def write_json(diff: "Diff", path: str | os.PathLike[str]) -> Path:
    """Writes a difference as JSON.

    Args:
      diff: what is written.
      path: of the file. Its folder must exist.
    """
    held = {
        "format": FORMAT,
        "schema": SCHEMA,
        "verdict": str(diff.verdict),
        "headline": diff.headline,
        "counts": {str(effect): count for effect, count in diff.counts.items()},
    }
    plain = to_plain(diff)
    text = json.dumps({**held, **plain}, allow_nan=False, indent=1)  # type: ignore[dict-item]
    return write_whole(path, lambda file: file.write_text(text + "\n", encoding="utf-8"))


def write_html(diff: "Diff", path: str | os.PathLike[str]) -> Path:
    """Writes a difference as one page that needs no other file and no network.

    Args:
      diff: what is written.
      path: of the file. Its folder must exist.
    """
    text = page(diff)
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def page(diff: "Diff") -> str:
    """Returns a difference as an HTML page."""
    headers, *rows = square(diff)
    lines = _html.Text("\n\n".join(environment(diff)))
    sections = [
        _html.Section("Who agrees with whom, in float64", (_html.Table(headers, rows), lines))
    ]
    sections += [_cases(diff.cases), _surface(diff), _streams(diff), _settings(diff)]
    title = "What an upgrade has changed"
    return _html.page(title, diff.headline, sections, state=_STATES[diff.verdict])


def _cases(cases: Sequence[CaseDiff]) -> _html.Section:
    rows = [(c.name, str(c.effect), c.mover, excess(c), f"{c.words}", _agreement(c)) for c in cases]
    headers = (
        "case",
        "effect",
        "moved",
        "x bound",
        "what",
        "agree (old/old new/old old/new new/new)",
    )
    table = _html.Table(headers, rows, [_state(c.effect) for c in cases])
    moved = [c for c in cases if c.moves]
    details = [
        _html.Table(
            (c.name, "in", "side", "effect", "moved by (eps)", "x bound", "what"),
            [
                (m.name, m.precision, m.side, str(m.effect), m.size, m.excess, m.words)
                for m in c.moves[:_SHOWN]
            ],
            [_state(m.effect) for m in c.moves[:_SHOWN]],
        )
        for c in moved
    ]
    return _html.Section("Cases, the gravest first", (table, *details))


def _agreement(case: CaseDiff) -> str:
    words = {None: "?", True: "yes", False: "no"}
    return " ".join(words[agree] for agree in case.square)


def _surface(diff: "Diff") -> _html.Section:
    rows = [(d.name, d.change, d.words) for d in diff.names]
    states = [_mixed(d.matters) for d in diff.names]
    table = _html.Table(("name", "change", "what"), rows, states)
    empty = _html.Text("All public names are as they were.")
    return _html.Section("Public names and defaults", table if rows else empty, folded=True)


def _streams(diff: "Diff") -> _html.Section:
    rows = [(d.name, str(d.effect), d.words) for d in diff.streams]
    states = [_mixed(d.effect in CHANGING) for d in diff.streams]
    table = _html.Table(("function", "effect", "what"), rows, states)
    empty = _html.Text("Every random function draws what it drew.")
    return _html.Section("Random streams", table if rows else empty)


def _settings(diff: "Diff") -> _html.Section:
    rows = [(s.name, s.old, s.new) for s in diff.settings]
    table = _html.Table(("setting", "old", "new"), rows)
    empty = _html.Text("Both environments are the same.")
    return _html.Section("Environment", table if rows else empty)


def _mixed(matters: bool) -> _html.State:
    return "mixed" if matters else "good"


def _state(effect: Effect) -> _html.State:
    if effect in BREAKING:
        return "bad"
    return _mixed(effect in CHANGING)
