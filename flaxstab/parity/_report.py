"""What a comparison found, and what somebody told it to overlook."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from flaxstab._checks import check
from flaxstab.parity._inputs import STEPS
from flaxstab.parity._layers import Location
from flaxstab.parity._verdict import FLOAT32, Finding, Side, Verdict

_SHOWN = 8  # a failure fits one screen
_GRAVITY = (
    Verdict.SEMANTICS_DIFFER,
    Verdict.JAX_WORSE,
    Verdict.TORCH_WORSE,
    Verdict.ILL_CONDITIONED,
    Verdict.AGREE,
)


_HINTS = (  # how the first failing quantity is called, and what usually lies behind it
    ("draws ", "the keys of random layers: fork a stream, or pass new rngs at each call"),
    ("loss", "the forward pass and the loss: compare both models with parity.compare first"),
    ("update", "learning rate, order of weight decay, eps, bias correction, sign, clipping"),
    ("gradient", "the norm's eps, its order, and the dtype it is summed in"),
    ("param", "what the step does besides the optimizer's update"),
    ("exp_avg", "the betas, bias correction, and what is averaged: the gradient with decay or not"),
    ("momentum_buffer", "the momentum: its decay, dampening, and what is averaged"),
    ("max_exp_avg_sq", "what the maximum is taken of: the moment before its bias correction"),
    ("buffer", "the momentum of the statistics and whether the variance is unbiased; the mode"),
    ("output", "the first layer that differs: eps, padding, kernel layout, the kind of GELU"),
    ("grad", "stop_gradient, custom gradients, and what is treated as a constant"),
    ("step ", "the momentum of the statistics and whether the variance is unbiased; the mode"),
    ("after evaluation", "what evaluation changes: statistics stand still in it"),
    ("evaluation", "the mode: which statistics, and that dropout is off"),
)
_ROUNDING = "the dtype that sums are kept in, and the algorithm (a one-pass variance cancels)"


class Tolerance(NamedTuple):
    """Widens the bound of some quantities, for a reason that the report shows.

    Attributes:
      pattern: of the quantities' names, with ``*`` and ``?``, such as ``'grad input *'``.
      factor: by which the derived bound grows; above 1.
      reason: why, in words.
    """

    pattern: str
    factor: float
    reason: str


class Departure(NamedTuple):
    """Where two trainings part.

    Attributes:
      step: the first step after which a tensor is outside its bound, from 1.
      name: the tensor that is outside it then; of several the first that a step computes: the
        loss, buffers from the first layer on, then from the last layer on moments, updates and
        parameters.
      dtype: the precision of that run.
      excess: its error over its bound.
    """

    step: int
    name: str
    dtype: str
    excess: float

    @property
    def layer(self) -> str:
        """The layer whose tensor it is, as PyTorch spells it; '' of the loss or a bare tensor."""
        _, _, tensor = self.name.partition(" ")
        return tensor.rpartition(".")[0]


class Report(NamedTuple):
    """What a comparison found.

    Attributes:
      findings: one per quantity and precision.
      notes: what was not compared, and why.
      tolerances: the bounds that were widened.
      departure: of two trainings, where they part; None if they do not.
      pinned: Flax layers that compute in less than float64 whatever their inputs.
      where: looks for the first layer that differs; None where there are no layers to look at.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    tolerances: tuple[Tolerance, ...] = ()
    departure: Departure | None = None
    pinned: tuple[str, ...] = ()
    where: Callable[[], Location] | None = None

    @property
    def location(self) -> Location | None:
        """Where the models differ, if they do and have layers; looked for when first asked."""
        return None if self.where is None or self.passed else self.where()

    @property
    def passed(self) -> bool:
        """Whether JAX's side is as it should be in every quantity."""
        return all(finding.passed for finding in self.findings)

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict; ill-conditioned only if an output or the loss is, in float64."""
        found = {finding.verdict for finding in self.findings}
        if found == {Verdict.AGREE, Verdict.ILL_CONDITIONED}:
            blind = any(
                f.verdict is Verdict.ILL_CONDITIONED and f.dtype == "float64"
                for f in self.findings
                if f.name.startswith(("output", "loss"))
            )
            return Verdict.ILL_CONDITIONED if blind else Verdict.AGREE
        return next((kind for kind in _GRAVITY if kind in found), Verdict.AGREE)

    @property
    def side(self) -> Side:
        """The side that the worst finding with a side names."""
        grave = [f for f in self.findings if f.verdict is self.verdict and f.side]
        return max(grave, key=lambda f: f.excess).side if grave else ""

    @property
    def worst(self) -> Finding:
        """The finding to look at first."""
        return min(self.findings, key=lambda f: (_GRAVITY.index(f.verdict), -f.excess))

    @property
    def gravity(self) -> int:
        """The verdict's place, 0 for the gravest kind."""
        return _GRAVITY.index(self.verdict)

    @property
    def headline(self) -> str:
        """The verdict, the side at fault and the counts, in one line."""
        counts = [
            f"{sum(f.verdict is kind for f in self.findings)} {kind}"
            for kind in _GRAVITY
            if any(f.verdict is kind for f in self.findings)
        ]
        side = f" ({self.side} is at fault)" if self.side else ""
        return f"{self.verdict}{side}: {', '.join(counts)} of {len(self.findings)} quantities"

    @property
    def telling(self) -> tuple[Finding, ...]:
        """The findings to be shown, float64's first: failures, or what is worse in PyTorch.

        What after more steps repeats what was found after fewer is left out.
        """
        worse = [f for f in self.findings if f.verdict is Verdict.TORCH_WORSE]
        grave = [f for f in self.findings if not f.passed] or worse
        grave = [f for f in grave if not _follows(f, grave)]
        return tuple(sorted(grave, key=lambda f: (f.dtype != "float64", f.passed)))

    @property
    def hints(self) -> tuple[str, ...]:
        """Where to look, in words."""
        return tuple(self._hints([*self.telling]))

    def __rich__(self) -> object:
        """Returns what ``rich`` prints: one screen, the gravest findings first."""
        from flaxstab.parity._report_screen import ReportScreen

        return ReportScreen(self)

    def __str__(self) -> str:
        lines = [self.headline]
        if self.departure is not None:
            first = self.departure
            layer = f" (layer {first.layer})" if first.layer else ""
            where = f"{first.name} after step {first.step}, in {first.dtype}"
            lines.append(f"  first apart: {where}{layer}")
        shown = self.telling or ((self.worst,) if self.findings else ())
        lines += [_line(f) for f in shown[:_SHOWN]]
        if len(shown) > _SHOWN:
            lines.append(f"  ... and {len(shown) - _SHOWN} more in report.findings")
        lines += [] if self.location is None else [f"  {self.location.line}"]
        lines += [f"  look at: {hint}" for hint in self.hints]
        lines += [f"  not compared: {note}" for note in self.notes[:3]]
        lines += [
            f"  tolerance: {t.pattern} x{t.factor:g}, because {t.reason}" for t in self.tolerances
        ]
        return "\n".join(lines)

    def _hints(self, grave: list[Finding]) -> list[str]:
        """Returns where to look, by what failed first in float64, or else at rounding."""
        wide = [f.name for f in grave if f.verdict is Verdict.SEMANTICS_DIFFER]
        small = all(f.jax_error < FLOAT32 or "dtypes" in f.explanation for f in grave)
        if wide and small and self.pinned:
            return [f"layers that pin a lower precision: {', '.join(self.pinned[:4])}"]
        if not wide:
            return [_ROUNDING] if grave else []
        first = wide if self.departure is None else [self.departure.name]
        if self.departure is not None and self.departure.name.startswith("step "):
            return ["how many steps each optimizer has counted"]
        found = (hint for start, hint in _HINTS if any(name.startswith(start) for name in first))
        return [next(found, f"what computes {first[0]}")]


def _follows(finding: Finding, grave: list[Finding]) -> bool:
    """Whether something after more steps repeats what was found after fewer."""
    found = re.fullmatch(r"(?:step (\d+)|after evaluation) (.+)", finding.name)
    if found is None:
        return False
    last = int(found[1] or max(STEPS) + 1)
    earlier = {found[2], *(f"step {n} {found[2]}" for n in STEPS if n < last)}
    return any(f.name in earlier and f.dtype == finding.dtype for f in grave)


def _line(finding: Finding) -> str:
    side = f", {finding.side}" if finding.side else ""
    return (
        f"  {finding.verdict}{side}: {finding.name} in {finding.dtype}: {finding.explanation} "
        f"({finding.excess:.2g} x the bound)"
    )


def factor_of(name: str, tolerances: tuple[Tolerance, ...]) -> float:
    """Returns by how much the bound of a quantity is widened."""
    return max((t.factor for t in tolerances if fnmatchcase(name, t.pattern)), default=1.0)


def check_tolerances(tolerances: Sequence[Tolerance]) -> tuple[Tolerance, ...]:
    """Returns the tolerances, unless one widens nothing or gives no reason.

    Raises:
      ValueError: if so.
    """
    are = not isinstance(tolerances, Tolerance) and all(
        isinstance(t, Tolerance) for t in tolerances
    )
    check(are, "tolerances must be a sequence of parity.Tolerance", tolerances=tolerances)
    for tolerance in tolerances:
        check(tolerance.factor > 1, "a tolerance must widen the bound", factor=tolerance.factor)
        check(bool(tolerance.reason.strip()), "a tolerance must give its reason", reason="''")
    return tuple(tolerances)
