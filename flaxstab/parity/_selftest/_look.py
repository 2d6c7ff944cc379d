"""Runs one case and says, quantity by quantity, what the comparison saw."""

import math
import re
from typing import NamedTuple

from flaxstab.parity._compare import compare
from flaxstab.parity._evidence import Evidence
from flaxstab.parity._selftest._laws import Law
from flaxstab.parity._selftest._plant import Sides
from flaxstab.parity._verdict import Finding, Verdict

_QUIET = (Verdict.AGREE, Verdict.ILL_CONDITIONED)
_KINDS = {  # of checks, by how the names of their quantities begin; the first that fits
    "output": r"output",
    "loss": r"loss",
    "evaluation": r"evaluation",
    "input gradient": r"grad input",
    "parameter gradient": r"grad ",
    "clipped gradient": r"gradient",
    "update": r"update|param",
    "statistics": r"buffer|step \d+ ",
    "optimizer state": r"",
}


class Mark(NamedTuple):
    """What was seen of one quantity.

    Attributes:
      name: the quantity.
      kind: of check.
      excess: its error over the bound; above 1 where the sides differ.
      differs: whether that is a fault of a side.
    """

    name: str
    kind: str
    excess: float
    differs: bool


class Seen(NamedTuple):
    """What was seen of one case.

    Attributes:
      verdict: the gravest.
      side: that is at fault, '' if nothing is or it cannot be told.
      marks: one per quantity and precision.
    """

    verdict: str
    side: str
    marks: tuple[Mark, ...]

    @property
    def excess(self) -> float:
        """The largest error over its bound."""
        return max((mark.excess for mark in self.marks), default=0.0)


def look(case: Sides | Law, seed: int = 0) -> Seen:
    """Compares two sides as every user does, or checks the law that both draw from.

    A comparison that cannot be made is seen, too: as a quantity 'refused'.

    Args:
      case: the sides, or their law.
      seed: of cotangents, gradients and draws.
    """
    return _law(case, seed) if isinstance(case, Law) else _comparison(case, seed)


def _law(law: Law, seed: int) -> Seen:
    found = law.evidence(seed)
    marks = [
        Mark(f"law: {evidence.quantity}", "law", _outside(evidence), not evidence.passed)
        for evidence in found.values()
    ]
    wrong = [side for side, evidence in found.items() if not evidence.passed]
    return Seen("law differs" if wrong else "agree", wrong[0] if len(wrong) == 1 else "",
                tuple(marks))  # fmt: skip


def _outside(evidence: Evidence) -> float:
    """Returns how far a statistic is from the middle of its bound, in half widths."""
    low, high = evidence.bound
    away = abs(evidence.statistic - (low + high) / 2) / ((high - low) / 2)
    return math.inf if math.isnan(away) else away  # NaN: the samples themselves are wrong


def _comparison(sides: Sides, seed: int) -> Seen:
    try:
        report = compare(
            sides.ours, sides.theirs, *sides.inputs,
            layout=sides.layout, dtypes=sides.dtypes, witness=sides.witness, seed=seed,
        )  # fmt: skip
    except ValueError as error:
        refusal = Mark(f"refused: {error}", "refused", float("inf"), differs=True)
        return Seen("refused", "", (refusal,))
    marks = [Mark(f.name, _kind(f), _excess(f), f.verdict not in _QUIET) for f in report.findings]
    return Seen(report.verdict, report.side, tuple(marks))


def _excess(finding: Finding) -> float:
    """Returns the larger of both sides' errors over their bounds."""
    if finding.dtype == "float64" or finding.verdict is not Verdict.TORCH_WORSE:
        return finding.excess
    return finding.torch_error / (2 * finding.jax_error + 2)


def _kind(finding: Finding) -> str:
    if finding.explanation.startswith("the dtypes differ"):
        return "dtype"
    if finding.dtype != "float64":
        return "numerics"
    return next(kind for kind, begins in _KINDS.items() if re.match(begins, finding.name))
