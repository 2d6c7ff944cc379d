"""What both sides of a comparison computed, and by what it is judged: what a baseline holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from flaxstab.parity._inputs import Values, is_float, largest
from flaxstab.parity._lockstep import AMPLIFIED, LONG, NOISE
from flaxstab.parity._magnitude import UNIT
from flaxstab.parity._verdict import SEMANTICS, judge_numerics

EARLY = (1, 2, 5)  # steps of a training that are kept, and these times 10, 100, ..., and the last


@dataclass
class Watched:
    """Values of both sides, by precision and quantity.

    Attributes:
      jax: JAX's values by precision.
      torch: PyTorch's; also ``'float64 of bfloat16'``, from weights and inputs rounded to that.
      units: by what each is judged: in float64 both sides must agree to 1e-12 of it, below that
        errors are counted in eps of it.
      errors: each side's error against its own float64 result by (precision, quantity), in eps of
        the unit.
      slack: by (precision, quantity) the errors in eps that are allowed beside twice another's;
        2 if it is not here.
    """

    jax: dict[str, Values] = field(default_factory=dict)
    torch: dict[str, Values] = field(default_factory=dict)
    units: dict[str, Values] = field(default_factory=dict)
    errors: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    slack: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, precision: str, ours: Values, theirs: Values, units: Values) -> None:
        """Keeps both sides' values of a precision."""
        self.jax[precision] = {**self.jax.get(precision, {}), **ours}
        self.torch[precision] = {**self.torch.get(precision, {}), **theirs}
        self.units[precision] = {**self.units.get(precision, {}), **units}


class StepWatch:
    """Watches two trainings, and keeps the steps that say most.

    Args:
      steps: how many there will be.
    """

    def __init__(self, steps: int) -> None:
        self.watched = Watched()
        self._last = steps
        self._exact: tuple[Values, Values] = {}, {}
        self._size: dict[str, float] = {}

    def __call__(
        self, step: int, precision: str, ours: Values, theirs: Values, spreads: Mapping[str, float]
    ) -> None:
        """Is shown one step of one precision; see :data:`flaxstab.parity._lockstep.Watch`."""
        units: Values
        if precision == "float64":
            self._exact = ours, theirs
            units = {n: self._unit(step, n, a, spreads.get(n, 0.0)) for n, a in ours.items()}
        else:
            units = self._judged(step, precision, ours, theirs, spreads)
        if is_kept(step, self._last):
            named = [{f"step {step} {n}": a for n, a in v.items()} for v in (ours, theirs, units)]
            self.watched.add(precision, *named)

    def _unit(self, step: int, name: str, ours: np.ndarray, spread: float) -> np.ndarray:
        """Returns what 1e-12 of is the bound that ``judge_step`` holds both sides to."""
        self._size[name] = max(largest(ours), self._size.get(name, 0.0))
        grown = min(step, LONG / SEMANTICS) * largest(ours)
        return np.asarray(max(grown, spread / UNIT))

    def _judged(
        self, step: int, precision: str, ours: Values, theirs: Values, spreads: Mapping[str, float]
    ) -> Values:
        """Keeps both sides' errors at a lower precision; returns their units."""
        units: dict[str, np.ndarray] = {}
        eps = float(jnp.finfo(precision).eps)
        exact = self._exact
        for name in (n for n in ours if n in theirs and n in exact[0] and n in exact[1]):
            if not is_float(exact[0][name]):
                continue
            spread, size = spreads.get(name, 0.0) / eps, self._size[name]
            unit, key = np.asarray(max(spread, size)), (precision, f"step {step} {name}")
            noise = NOISE if spread > AMPLIFIED * size else 1.0
            oracles = exact[0][name], exact[1][name]
            found = judge_numerics(name, ours[name], theirs[name], oracles, unit, precision)
            units[name] = unit
            self.watched.errors[key] = found.jax_error, found.torch_error
            self.watched.slack[key] = noise * (2.0 + step)
        return units


def is_kept(step: int, last: int) -> bool:
    """Whether a baseline keeps a step: 1, 2, 5, 10, 20, 50, ... and the last."""
    digits = 10 ** (len(str(step)) - 1)
    return step == last or (step % digits == 0 and step // digits in EARLY)
