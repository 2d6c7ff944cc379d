"""Collects what came of each layer, and names the first that differs."""

from collections.abc import Mapping, Sequence

import numpy as np

from flaxstab.parity._layer_judge import Found
from flaxstab.parity._layers import WHOLE, Direction, Kind, LayerError, Location
from flaxstab.parity._verdict import Finding, Verdict


class LayerTable:
    """What came of each layer so far.

    Args:
      order: the layers' names in the order in which their calls ended: children before parents.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self.order = list(order)
        self._errors: dict[Direction, dict[str, LayerError]] = {"forward": {}, "backward": {}}
        self._notes: dict[str, None] = {}

    def add(
        self, name: str, found: Found | None, reason: str, inherited: Mapping[Direction, float]
    ) -> None:
        """Takes what came of a layer.

        Args:
          name: the layer's.
          found: the findings; None if it could not be run alone.
          reason: why not.
          inherited: how far it is off where it stands.
        """
        for direction, errors in self._errors.items():
            if found is None:
                errors[name] = LayerError(
                    name or WHOLE, direction, np.nan, inherited[direction], False, "unknown", reason
                )
            else:
                errors[name] = self._error(name, direction, found, inherited[direction])

    def _error(self, name: str, direction: Direction, found: Found, inherited: float) -> LayerError:
        back = direction == "backward"
        findings = [f for f in found.findings if f.name.startswith("grad ") == back]
        if not findings:
            note = "; ".join(found.notes) or "it has no gradient"
            return LayerError(name or WHOLE, direction, np.nan, inherited, False, "unknown", note)
        worst = max(findings, key=excess)
        # Of failures the first is told, not the worst: output, statistics, then evaluation.
        told = next((f for f in findings if _differs(f)), worst)
        differs = _differs(told)
        if differs and self._inside(name, direction):
            return self._holding(name, direction, inherited)
        kind: Kind = "own" if differs else "inherited" if inherited > 1 else "agrees"
        note = f"{told.name} in {told.dtype}: {told.explanation}"
        return LayerError(name or WHOLE, direction, excess(worst), inherited, differs, kind, note)

    def holds(self, name: str) -> bool:
        """Whether a layer inside this one differs forward: then so does this one."""
        inside = self._inside(name, "forward")
        if inside:
            for direction, errors in self._errors.items():
                errors[name] = self._holding(name, direction, np.nan)
        return bool(inside)

    def _holding(self, name: str, direction: Direction, inherited: float) -> LayerError:
        inside = self._inside(name, direction) or self._inside(name, "forward")
        note = f"it holds {inside[0]}, which differs"
        return LayerError(name or WHOLE, direction, np.nan, inherited, False, "unknown", note)

    def _inside(self, name: str, direction: Direction) -> list[str]:
        start = f"{name}." if name else ""
        differing = self.differing(direction)
        return [n for n in differing if n != name and n.startswith(start)]

    def differing(self, direction: Direction) -> list[str]:
        """Returns the layers that differ themselves, in order."""
        return [name for name, error in self._errors[direction].items() if error.differs]

    def location(self, notes: Sequence[str], *, backward: bool = True) -> Location:
        """Returns what was found; forward comes before backward.

        Args:
          notes: what could not be judged.
          backward: whether gradients were judged; else there are no such rows.
        """
        ahead, back = (list(errors.values()) for errors in self._errors.values())
        layers = (*ahead, *reversed(back)) if backward else tuple(ahead)
        first = next((e for e in layers if e.differs), None)
        return Location(
            layers,
            "" if first is None else first.name,
            "" if first is None else first.direction,
            tuple(notes),
        )


def excess(finding: Finding) -> float:
    """Returns the larger of both sides' errors over their bounds."""
    if finding.verdict is not Verdict.TORCH_WORSE:
        return finding.excess
    return finding.torch_error / (2 * finding.jax_error + 2)


def _differs(finding: Finding) -> bool:
    return not finding.passed or bool(finding.side)
