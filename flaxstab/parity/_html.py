"""A report as one HTML file: no script, no network, light and dark, everything escaped."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flaxstab._checks import check
from flaxstab.parity._chart import Bars, svg
from flaxstab.parity._plain import printable

__all__ = ["Bars", "Section", "Table", "Text", "page"]

State = Literal["good", "bad", "mixed", ""]

_STATES: dict[str, str] = {
    "good": "\N{CHECK MARK}",
    "bad": "\N{MULTIPLICATION X}",
    "mixed": "!",
    "": "",
}


@dataclass(frozen=True)
class Text:
    """A paragraph, or lines to be shown as they are.

    Attributes:
      words: the text; empty lines divide paragraphs.
      code: whether to keep its lines and spaces, in letters of one width.
    """

    words: str
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      headers: of the columns.
      rows: a cell for each header; numbers stand at the right, floats with 3 digits.
      states: of each row ``'good'``, ``'bad'``, ``'mixed'`` or ``''``: a mark in front of it. None
        at all leave the column of marks out.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    states: Sequence[State] = ()

    def __post_init__(self) -> None:
        wrong = [list(row) for row in self.rows if len(row) != len(self.headers)]
        rule = "every row must have a cell for each header"
        check(not wrong, rule, headers=list(self.headers), row=wrong[:1])
        rule, rows = "every row must have a state, or none", len(self.rows)
        check(len(self.states) in (0, rows), rule, states=len(self.states), rows=rows)
        unknown = [state for state in self.states if state not in _STATES]
        check(not unknown, f"states must be of {list(_STATES)}", states=unknown[:3])


Body = Text | Table | Bars


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
      heading: its title.
      body: what it shows, or several such.
      folded: whether the reader has to open it.
    """

    heading: str
    body: Body | Sequence[Body]
    folded: bool = False


def page(title: str, verdict: str, sections: Sequence[Section], *, state: State = "") -> str:
    """Returns a whole HTML document that needs no other file.

    Args:
      title: of the page.
      verdict: the one sentence that a reader shall see first.
      sections: from the top.
      state: the verdict's colour and mark: ``'good'``, ``'bad'``, ``'mixed'`` or ``''``.

    Raises:
      ValueError: for another state.
    """
    check(state in _STATES, f"state must be of {list(_STATES)}", state=state)
    parts = [_section(section) for section in sections]
    mark = f'<span class="mark" aria-hidden="true">{_STATES[state]}</span> ' if state else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # A browser then fetches and runs nothing, whatever a name or an error message holds.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_safe(title)}</h1>\n"
        f'<p class="verdict {state}">{mark}{_safe(verdict)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    bodies = section.body
    bodies = [bodies] if isinstance(bodies, Text | Table | Bars) else bodies
    inner, heading = "\n".join(_body(body) for body in bodies), _safe(section.heading)
    if section.folded:
        return f"<details>\n<summary><h2>{heading}</h2></summary>\n{inner}\n</details>"
    return f"<section>\n<h2>{heading}</h2>\n{inner}\n</section>"


def _body(body: Body) -> str:
    if isinstance(body, Table):
        return _table(body)
    if isinstance(body, Bars):
        return _bars(body)
    if body.code:
        return f'<pre tabindex="0">{_safe(body.words)}</pre>'
    return "\n".join(f"<p>{_safe(words)}</p>" for words in re.split(r"\n\s*\n", body.words))


def _table(table: Table) -> str:
    marked = bool(table.states)
    heads = ['<th scope="col"><span class="hidden">state</span></th>'] if marked else []
    heads += [
        f'<th scope="col"{_kind(table.rows[0][i] if table.rows else "")}>{_safe(head)}</th>'
        for i, head in enumerate(table.headers)
    ]
    rows = []
    for i, row in enumerate(table.rows):
        state = table.states[i] if marked else ""
        word = f'<span class="hidden">{state}</span>' if state else ""
        mark = [f'<td class="mark">{_STATES[state]}{word}</td>'] if marked else []
        cells = [*mark, *(_cell(value) for value in row)]
        rows.append(f'<tr class="{state}">' + "".join(cells) + "</tr>")
    return (
        '<div class="wide" tabindex="0"><table>\n<thead><tr>' + "".join(heads) + "</tr></thead>\n"
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _cell(value: object) -> str:
    words = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"<td{_kind(value)}>{_safe(words)}</td>"


def _kind(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return ' class="number"' if number else ""


def _bars(bars: Bars) -> str:
    if not bars.labels:
        return f"<p>{_safe(bars.title)}: nothing to show.</p>"
    second = f"; the line under it: {bars.others_title}" if bars.others else ""
    beyond = "" if bars.limit is None else f"; the dashed line is {bars.limit:g}"
    excused = "; ochre: beyond it, and excused" if any(bars.excused) else ""
    words = f"{bars.title} (bars, logarithmic{beyond}{excused}{second})"
    headers = ["", bars.title, *([bars.others_title] if bars.others else [])]
    columns = [bars.labels, [float(v) for v in bars.values], [float(v) for v in bars.others]]
    numbers = Table(headers, list(zip(*(c for c in columns if len(c)), strict=True)))
    return (
        f'<figure>\n<figcaption>{_safe(words)}</figcaption>\n<div class="wide" tabindex="0">'
        f"{svg(bars)}</div>\n<details><summary>the numbers</summary>\n{_table(numbers)}\n"
        "</details>\n</figure>"
    )


def _safe(words: str) -> str:
    """Returns text without a meaning in HTML, and without what HTML may not contain."""
    return html.escape(printable(words))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff;
  --line: #d5dbe1; --panel: #f5f7f9; --good: #1a7f4b; --bad: #c32f27; --mixed: #8a5a00;
  --bar: #4f7cac; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181d;
  --line: #353d47; --panel: #1d232a; --good: #4ec98a; --bad: #ff7b72; --mixed: #e0b050;
  --bar: #6c9bd1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 22px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0; display: inline; }
section, main > details { margin-top: 32px; }
p { margin: 0; max-width: 78ch; overflow-wrap: anywhere; }
pre, figure { margin: 0; }
section > * + *, details > * + *, figure > * + * { margin-top: 12px; }
.verdict { font-size: 17px; font-weight: 600; max-width: none; padding: 12px 16px;
  border-radius: 6px; background: var(--panel); border-left: 5px solid var(--soft); }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict.mixed { border-color: var(--mixed); }
.good .mark { color: var(--good); } .bad .mark { color: var(--bad); }
.mixed .mark { color: var(--mixed); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; min-width: 50%; }
th { text-align: left; color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: break-word; min-width: 3em; max-width: 36em; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.mark { width: 1.6em; min-width: 0; font-weight: 700; }
pre { padding: 12px 14px; overflow-x: auto; background: var(--panel);
  border-radius: 6px; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
summary { cursor: pointer; } figure summary, figcaption { color: var(--soft); font-size: 13.5px; }
svg { display: block; width: 100%; min-width: 620px; height: auto; }
svg text { font: 12px ui-monospace, "DejaVu Sans Mono", Consolas, monospace; fill: var(--ink); }
svg .name { text-anchor: end; } svg .tick { text-anchor: middle; fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .within { fill: var(--bar); }
svg .beyond { fill: var(--bad); } svg .excused { fill: var(--mixed); }
svg text.within, svg text.excused { fill: var(--soft); }
svg text.beyond { fill: var(--bad); font-weight: 700; }
svg .limit { stroke: var(--ink); stroke-dasharray: 4 3; }
svg .other { stroke: var(--mixed); stroke-width: 2; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
@media print { main { max-width: none; padding: 0; } }
"""
