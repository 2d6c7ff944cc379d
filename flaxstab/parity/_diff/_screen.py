"""A difference of two baselines on a terminal: one screen, the gravest first."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flaxstab.parity._diff._types import CaseDiff, Effect, Outcome, Square, counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from flaxstab.parity._diff._diff import Diff

_LINES = 24  # of a screen
_STYLES = {Outcome.SAFE: "bold green", Outcome.CHANGES: "bold yellow", Outcome.BREAKS: "bold red"}
_SIDES = {"jax": "JAX", "torch": "PyTorch", "both": "both", "": ""}
_COUNTED = (Effect.SAME, Effect.NEITHER, Effect.NEW, Effect.GONE)  # these have no row of their own
_TOLD = 3  # names and streams of each kind


class DiffScreen(NamedTuple):
    """A difference, to be printed by ``rich``."""

    diff: "Diff"

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        from rich.padding import Padding
        from rich.text import Text

        diff = self.diff
        above: list[RenderableType] = [Text(diff.headline, style=_STYLES[diff.verdict])]
        above += [Padding(line, (0, 0, 0, 2)) for line in map(Text, environment(diff))]
        below = [Padding(line, (0, 0, 0, 2)) for line in map(Text, told(diff))]
        cases = [case for case in diff.cases if case.effect not in _COUNTED]

        def lines(part: "RenderableType") -> int:
            return len(console.render_lines(part, options))

        room = min(console.height, _LINES) - 1 - sum(map(lines, [*above, *below]))
        width = options.max_width * 2 // 5

        def table(count: int) -> "RenderableType":
            return _table(cases[:count], width)

        fits = (n for n in range(len(cases), 1, -1) if lines(table(n)) < room)
        shown = next(fits, 1)
        yield from above
        if cases:
            yield table(shown)
        if len(cases) > shown:
            more = counted(len(cases) - shown).replace(" ", " more ")
            yield Text(f"  ... and {more}, with --json or --html")
        yield from below


def _table(cases: Sequence[CaseDiff], width: int) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim", expand=True)
    widest = max(len("case"), *(len(case.name) for case in cases))
    table.add_column("case", width=min(widest, width), no_wrap=True)
    table.add_column("moved", width=len(_SIDES["torch"]), no_wrap=True)
    table.add_column("x bound", width=len("x bound"), justify="right", no_wrap=True)
    table.add_column("what", ratio=1, overflow="fold")
    for case in cases:
        over = len(case.name) > width  # of a test's name the end tells most
        name = f"...{case.name[3 - width :]}" if over else case.name
        cells = name, _SIDES[case.mover], excess(case), f"{case.effect}: {case.words}"
        table.add_row(*map(Text, cells))
    return table


def excess(case: CaseDiff) -> str:
    """Returns how much of its bound a case's worst move uses; '' if none is judged by one."""
    judged = [m for m in case.moves if m.effect is case.effect and m.bound]
    return f"{max(m.excess for m in judged):.2g}" if judged else ""


def environment(diff: "Diff") -> list[str]:
    """Says in a line or two what differs between the environments."""
    named = [s for s in diff.settings if " " not in s.name or s.name == "python version"]
    versions = [f"{s.name.split()[0]} {s.old or 'none'} -> {s.new or 'none'}" for s in named]
    others = len(diff.settings) - len(versions)
    words = "; ".join(versions) or "no package has another version"
    more = f" (and {others} other setting{'s' * (others != 1)})" if others else ""
    lines = [words + more]
    if diff.torch == "recorded":
        version = f" {diff.torch_version[1]}" if diff.torch_version[1] else ""
        lines.append(f"PyTorch's side of the new file is recorded{version}: only JAX's can move")
    return lines


def square(diff: "Diff") -> list[tuple[str, str, str]]:
    """Returns the rows of the table of who agrees with whom: how many cases of how many."""

    def share(pair: str) -> str:
        found = [getattr(case.square, pair) for case in diff.cases if case.square != Square()]
        known = [agree for agree in found if agree is not None]
        return f"{sum(known)} of {len(known)}"

    label = " (recorded)" if diff.torch == "recorded" else ""
    return [
        ("", "old PyTorch", f"new PyTorch{label}"),
        ("old JAX", share("old_old"), share("old_new")),
        ("new JAX", share("new_old"), share("new_new")),
    ]


def told(diff: "Diff") -> list[str]:
    """Returns lines on agreement, random streams, public names and cases."""
    _, *rows = square(diff)
    pairs = [
        f"{row[0].split()[0]}-{new} {cell.replace(' of ', '/')}"
        for row in rows
        for new, cell in zip(("old", "new"), row[1:], strict=True)
    ]
    lines = [f"agree in float64 (JAX-PyTorch): {', '.join(pairs)}"]
    lines.append("random streams: " + _streams(diff))
    lines.append("public names: " + _names(diff))
    lines += [f"  {d.name}: {d.words}" for d in [d for d in diff.names if d.matters][:_TOLD]]
    for effect in (Effect.GONE, Effect.NEW, Effect.NEITHER):
        found = [case.name for case in diff.cases if case.effect is effect]
        what = "that runs in neither" if effect is Effect.NEITHER else effect
        lines += [f"{counted(len(found))} {what}: {_few(found)}"] if found else []
    return lines


def _streams(diff: "Diff") -> str:
    other = [s.name for s in diff.streams if s.effect is Effect.STREAM]
    gone = [s.name for s in diff.streams if s.effect is Effect.GONE]
    rounded = sum(s.effect is Effect.ROUNDING for s in diff.streams)
    parts = [f"{len(other)} changed ({_few(other)})"] if other else ["none changed"]
    parts += [f"{len(gone)} gone ({_few(gone)})"] if gone else []
    parts += [f"{rounded} moved in the last digits"] if rounded else []
    return ", ".join(parts)


def _names(diff: "Diff") -> str:
    kinds = dict.fromkeys(d.change for d in diff.names)
    counts = [f"{sum(d.change == kind for d in diff.names)} {kind}" for kind in kinds]
    return ", ".join(counts) or "all as they were"


def _few(names: Sequence[str]) -> str:
    more = f", ... {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more
