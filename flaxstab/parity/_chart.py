"""Bars on a logarithmic scale as inline SVG, readable in light and dark and without colour."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flaxstab._checks import check
from flaxstab.parity._plain import printable

_LETTER, _ROW, _PLOT, _AXIS = 7.3, 20, 560, 26  # pixels: of a 12 px monospaced letter, of a line
_LONGEST = 44  # letters of a label
_DECADES = 24  # a scale of more would show nothing


@dataclass(frozen=True)
class Bars:
    """One bar for each label, on a logarithmic scale.

    Attributes:
      labels: what is measured, from the top.
      values: at least 0; infinity and NaN fill the scale and say so.
      title: what the values are, with their unit.
      limit: a line; what is beyond it is marked. ``None`` draws none.
      others: a second value for each label, drawn as a thin line under the bar.
      others_title: what these are.
      excused: for each label, whether it may be beyond the limit; none for none.
    """

    labels: Sequence[str]
    values: Sequence[float]
    title: str = "error over its bound"
    limit: float | None = 1.0
    others: Sequence[float] = ()
    others_title: str = ""
    excused: Sequence[bool] = ()

    def __post_init__(self) -> None:
        labels, values = len(self.labels), len(self.values)
        check(
            labels == values, "there must be a value for each label", labels=labels, values=values
        )
        rule = "there must be another value for each label, or none"
        check(len(self.others) in (0, labels), rule, labels=labels, others=len(self.others))
        rule = "there must be an excuse for each label, or none"
        check(len(self.excused) in (0, labels), rule, labels=labels, excused=len(self.excused))
        every = (*self.values, *self.others)
        negative = [value for value in every if value < 0]
        check(not negative, "values must be at least 0", values=negative[:3])


def svg(bars: Bars) -> str:
    """Returns a chart as an SVG element.

    Args:
      bars: at least one.
    """
    scale = _Scale(bars)
    names = [_short(label) for label in bars.labels]
    left = 12 + _LETTER * max((len(name) for name in names), default=0)
    width, bottom = left + _PLOT + 84, _AXIS + _ROW * len(names)
    parts = [
        f'<svg role="img" viewBox="0 0 {width:.0f} {bottom + 8:.0f}" '
        f'style="max-width:{width:.0f}px" aria-label="{html.escape(printable(_said(bars)))}">'
    ]
    for power in scale.ticks:
        x = left + scale.place(10.0**power) * _PLOT
        parts += [
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_AXIS - 6}" y2="{bottom}"/>',
            f'<text class="tick" x="{x:.1f}" y="{_AXIS - 12}">{_power(power)}</text>',
        ]
    for row, (label, name) in enumerate(zip(bars.labels, names, strict=True)):
        parts += _bar(bars, scale, row, left, label, name)
    if bars.limit is not None:
        x = left + scale.place(bars.limit) * _PLOT
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}"/>')
    return "\n".join([*parts, "</svg>"])


class _Scale:
    """Where values stand between 0 and 1."""

    def __init__(self, bars: Bars) -> None:
        every = [*bars.values, *bars.others, *([] if bars.limit is None else [bars.limit])]
        powers = [math.log10(v) for v in every if 0 < v < math.inf] or [0.0]
        self.high = math.ceil(max(powers) + 0.05)
        self.low = max(math.floor(min(powers) - 0.05), self.high - _DECADES)
        every_nth = 1 + (self.high - self.low) // 10
        self.ticks = range(self.low, self.high + 1, every_nth)

    def place(self, value: float) -> float:
        """Returns the place; that of infinity and NaN is the end."""
        if not value < math.inf:
            return 1.0
        if value <= 0:
            return 0.0
        return max((math.log10(value) - self.low) / (self.high - self.low), 0.0)


def _bar(bars: Bars, scale: _Scale, row: int, left: float, label: str, name: str) -> list[str]:
    value, y = bars.values[row], _AXIS + _ROW * row
    beyond = not value < math.inf or (bars.limit is not None and not value <= bars.limit)
    excused = beyond and bool(bars.excused) and bars.excused[row]
    kind = "excused" if excused else "beyond" if beyond else "within"
    long = scale.place(value) * _PLOT
    shown = f"{value:.3g}" + (" \N{BLACK LEFT-POINTING TRIANGLE}" if kind == "beyond" else "")
    parts = [
        f"<g><title>{html.escape(printable(label))}: {value:.3g}</title>",
        f'<text class="name" x="{left - 8:.0f}" y="{y + 14}">{html.escape(printable(name))}</text>',
        f'<rect class="{kind}" x="{left:.1f}" y="{y + 4}" width="{long:.1f}" height="12" rx="2"/>',
        f'<text class="value {kind}" x="{left + long + 6:.1f}" y="{y + 14}">{shown}</text>',
    ]
    if bars.others:
        end = left + scale.place(bars.others[row]) * _PLOT
        parts.append(
            f'<line class="other" x1="{left:.1f}" x2="{end:.1f}" y1="{y + 17.5}" y2="{y + 17.5}"/>'
        )
    return [*parts, "</g>"]


def _short(label: str) -> str:
    """Returns a label whose middle is left out if it is long."""
    half = _LONGEST // 2
    return (
        label
        if len(label) <= _LONGEST
        else f"{label[: half - 1]}\N{HORIZONTAL ELLIPSIS}{label[-half:]}"
    )


def _power(power: int) -> str:
    return {-1: "0.1", 0: "1", 1: "10"}.get(power, f"1e{power}")


def _said(bars: Bars) -> str:
    """Returns the chart in a sentence."""
    if not bars.values:
        return f"{bars.title}: nothing"
    worst = max(range(len(bars.values)), key=lambda i: (math.isnan(bars.values[i]), bars.values[i]))
    text = (
        f"{bars.title} of {len(bars.values)} items; the largest is {bars.values[worst]:.2g}, of "
        f"{bars.labels[worst]}"
    )
    if bars.limit is None:
        return text
    excused = bars.excused or [False] * len(bars.values)
    pairs = zip(bars.values, excused, strict=True)
    beyond = sum(not value <= bars.limit and not forgiven for value, forgiven in pairs)
    return f"{text}; {beyond} beyond {bars.limit:g}"
