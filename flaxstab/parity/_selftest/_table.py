"""The table of planted faults: found or not, by which check, on which side."""

from collections.abc import Sequence
from typing import NamedTuple

from flaxstab.parity._selftest._plant import Fault
from flaxstab.parity._words import aligned

RIGHT = 0.99  # of the faults must be found on the side where they are


class Outcome(NamedTuple):
    """What came of one planted fault.

    Attributes:
      fault: what was planted.
      side: where.
      verdict: the comparison's.
      named: the side that it names.
      caught: the quantity that must catch the fault and did; '' if none did.
      kinds: the kinds of checks that saw it.
      excess: the error of that quantity over its bound.
      clean: the largest such figure of the same case without the fault.
    """

    fault: Fault
    side: str
    verdict: str
    named: str
    caught: str
    kinds: frozenset[str]
    excess: float
    clean: float

    @property
    def found(self) -> bool:
        """Whether the check that must catch the fault did."""
        return bool(self.caught)

    @property
    def right(self) -> bool:
        """Whether it was found on the side where it is."""
        return self.found and self.named == self.side


class Clean(NamedTuple):
    """What came of a case in which nothing is planted.

    Attributes:
      case: its name.
      alarms: the quantities that differ nevertheless.
      excess: the largest error over its bound.
    """

    case: str
    alarms: tuple[str, ...]
    excess: float


class Table(NamedTuple):
    """What the self-test found.

    Attributes:
      outcomes: one per fault and side.
      clean: one per case.
      absent: faults that cannot be planted in the side that was asked for.
    """

    outcomes: tuple[Outcome, ...]
    clean: tuple[Clean, ...]
    absent: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[Outcome, ...]:
        """The outcomes of the faults that must be found."""
        return tuple(o for o in self.outcomes if not o.fault.limit)

    @property
    def passed(self) -> bool:
        """Whether every fault was found, the side named in 99 %, and no clean case alarmed."""
        right = sum(outcome.right for outcome in self.required)
        found = all(outcome.found for outcome in self.required)
        quiet = not any(case.alarms for case in self.clean)
        return found and quiet and right >= RIGHT * len(self.required)

    def __str__(self) -> str:
        blocks = [_outcomes(self.outcomes), "\n".join([*self.notes(), *self.sums()])]
        return "\n\n".join(block for block in blocks if block)

    def sums(self) -> list[str]:
        """Returns how many faults were found, and on which side."""
        count = len(self.required)
        found = sum(outcome.found for outcome in self.required)
        right = sum(outcome.right for outcome in self.required)
        quiet = sum(not case.alarms for case in self.clean)
        highest = max((case.excess for case in self.clean), default=0.0)
        return [
            f"faults found {found}/{count}",
            f"side named rightly {right}/{count}",
            f"clean cases without alarm {quiet}/{len(self.clean)} "
            f"(largest error {highest:.2g} of its bound)",
        ]

    def notes(self) -> list[str]:
        """Returns what went wrong, and what the comparison is known not to see."""
        lines = [f"not found: {o.fault.name} ({o.side})" for o in self.required if not o.found]
        lines += [
            f"wrong side: {o.fault.name} ({o.side}, named {o.named or 'none'})"
            for o in self.required
            if o.found and not o.right
        ]
        lines += [f"false alarm: {c.case}: {', '.join(c.alarms)}" for c in self.clean if c.alarms]
        for o in (o for o in self.outcomes if o.fault.limit):
            seen = "seen by now, so no limit any more" if o.kinds else o.fault.limit
            lines.append(f"limit: {o.fault.name} ({o.side}): {seen}")
        if self.absent:
            lines.append(f"left out, for that side cannot have it: {', '.join(self.absent)}")
        return lines


def _outcomes(outcomes: Sequence[Outcome]) -> str:
    """A line per fault, with a letter per kind of check that saw it."""
    if not outcomes:
        return ""
    kinds = sorted({kind for o in outcomes for kind in o.kinds})
    letters = {kind: chr(ord("a") + n) for n, kind in enumerate(kinds)}
    heads = ("fault", "case", "planted", "named", "verdict", "seen by", "caught by", "excess")
    rows = [(*heads, "clean")]
    rows += [
        (o.fault.name, o.fault.case, o.side, o.named or "-", o.verdict,
         "".join(letters[kind] if kind in o.kinds else "." for kind in kinds),
         o.caught or ("-" if o.fault.limit else f"MISSED: {o.fault.check}"),
         f"{o.excess:.2g}", f"{o.clean:.1g}")
        for o in outcomes
    ]  # fmt: skip
    counts = (f"{letters[k]} {k} ({sum(k in o.kinds for o in outcomes)})" for k in kinds)
    legend = f"seen by: {', '.join(counts)}"
    return "\n".join([*aligned(rows), "", legend])
