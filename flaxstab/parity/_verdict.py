"""Judges one quantity computed by both frameworks at two precisions."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import is_float, largest

SEMANTICS = 1e-12  # of the magnitude, in float64: 4,500 eps (DESIGN, "How parity is judged")
FLOAT32 = 1e-6  # differences below it, and far above those of float64, are float32's
CANCELLED = 16.0  # eps of its terms: of a gradient that is smaller, at most one digit is left
BLIND = 1e-6  # of a quantity's size: a float64 bound above this compares fewer than 6 digits

_PASSED_ON = ("output", "evaluation", "grad input")  # what the next layer sees the dtype of

Side = Literal["jax", "torch", ""]


class Verdict(StrEnum):
    """What the comparison of one quantity found."""

    AGREE = "agree"
    JAX_WORSE = "jax_worse"
    TORCH_WORSE = "torch_worse"
    ILL_CONDITIONED = "ill_conditioned"
    SEMANTICS_DIFFER = "semantics_differ"


class Finding(NamedTuple):
    """One quantity's verdict.

    Attributes:
      name: the quantity, by PyTorch's names.
      verdict: what was found.
      dtype: the precision that was judged.
      jax_error: in float64 the difference between the sides, in units of the magnitude; else
        JAX's error, in eps of the sensitivity.
      torch_error: PyTorch's error in the same unit.
      bound: what ``jax_error`` may be.
      explanation: one sentence.
      side: whose fault it is, 'jax' or 'torch'; '' if nobody's, or if it cannot be told.
    """

    name: str
    verdict: Verdict
    dtype: str
    jax_error: float
    torch_error: float
    bound: float
    explanation: str
    side: Side = ""

    @property
    def passed(self) -> bool:
        """Whether JAX's side is as it should be, or nobody's can be."""
        return self.verdict not in (Verdict.JAX_WORSE, Verdict.SEMANTICS_DIFFER)

    @property
    def excess(self) -> float:
        """JAX's error over its bound: above 1 it does not pass."""
        return _ratio(self.jax_error, self.bound)


def differ(name: str, dtype: str, explanation: str, side: Side = "") -> Finding:
    """Returns the finding that two quantities cannot even be subtracted."""
    kind = Verdict.SEMANTICS_DIFFER
    return Finding(name, kind, dtype, np.inf, np.inf, SEMANTICS, explanation, side)


def repeated_draws(names: Iterable[str]) -> list[Finding]:
    """Returns the findings that layers drew the same random mask twice."""
    words = "the same mask was drawn twice: the layer's random stream does not advance"
    return [differ(f"draws {name}", "float64", words, "jax") for name in sorted(names)]


def judge_semantics(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    magnitude: float | np.ndarray,
    factor: float = 1.0,
) -> Finding:
    """Judges a float64 quantity: both sides must agree to 1e-12 of its magnitude.

    Args:
      name: the quantity.
      ours: JAX's value.
      theirs: PyTorch's value.
      magnitude: M of the quantity, or of each element.
      factor: by which somebody, with a reason, widens the bound.
    """
    mismatch = places_that_differ(ours, theirs)
    if mismatch:
        return differ(name, "float64", mismatch)
    if is_float(ours) != is_float(theirs):
        return differ(name, "float64", f"the dtypes differ: {ours.dtype} and {theirs.dtype}")
    if not is_float(ours):
        equal = np.array_equal(ours, theirs)
        words = "integers are equal" if equal else "integers differ"
        kind = Verdict.AGREE if equal else Verdict.SEMANTICS_DIFFER
        return Finding(name, kind, "float64", *((0.0, 0.0) if equal else (np.inf,) * 2), 1.0, words)
    units = np.broadcast_to(np.asarray(magnitude, np.float64), ours.shape)
    error, worst = _worst(gaps(ours, theirs), units)
    bound = SEMANTICS * factor
    words = f"the sides differ by {error:.1e} of the magnitude {worst:.1e} in float64"
    if not error <= bound:  # also for NaN
        kind = Verdict.SEMANTICS_DIFFER
        if 1e-11 < error < FLOAT32:
            words += " (something rounds to float32: a constant, dtype=, a softmax?)"
        return Finding(name, kind, "float64", error, error, bound, words)
    return _agreeing(
        Finding(name, Verdict.AGREE, "float64", error, error, bound, words), theirs, units
    )


def _agreeing(finding: Finding, theirs: np.ndarray, units: np.ndarray) -> Finding:
    """Returns a finding of agreement, or that there was little or nothing to agree on."""
    if theirs.size and not np.isfinite(np.asarray(theirs, np.float64)).any():
        kind, words = Verdict.ILL_CONDITIONED, "no element is finite on either side"
        return finding._replace(verdict=kind, explanation=words)
    common = float(units.min(initial=np.inf))  # that of all but far larger elements
    size = largest(np.where(units <= common, np.asarray(theirs, np.float64), 0))
    if theirs.size and finding.bound * common > BLIND * size:
        kind, words = Verdict.ILL_CONDITIONED, _cancelling(size, common)
        return finding._replace(verdict=kind, explanation=words)
    return finding


def _cancelling(size: float, magnitude: float) -> str:
    if size <= SEMANTICS * magnitude:
        return (
            "it is 0 up to rounding on both sides, so there is nothing to compare (a bias before "
            "a normalisation has no gradient)"
        )
    lost = f"terms {magnitude / size:.0e} times as large cancel in JAX's program"
    return f"{lost}: float64 sees only differences above {SEMANTICS * magnitude / size:.0e} of it"


def judge_numerics(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    oracles: tuple[np.ndarray, np.ndarray],
    sensitivity: float | np.ndarray,
    dtype: DTypeLike,
    factor: float = 1.0,
    slack: float = 2.0,
) -> Finding:
    """Judges a low-precision quantity: our error may be 2x torch's plus 2 eps of the sensitivity.

    Args:
      name: the quantity.
      ours: JAX's value at the dtype.
      theirs: PyTorch's value at the dtype.
      oracles: the float64 value of JAX's program and of PyTorch's, for the same inputs.
      sensitivity: of the quantity, or of each element, to the inputs.
      dtype: the precision judged.
      factor: by which somebody, with a reason, widens the bound.
      slack: the eps of the sensitivity that are allowed beside twice the other side's error.
    """
    label = np.dtype(dtype).name
    if ours.shape != oracles[0].shape or theirs.shape != oracles[1].shape:
        return differ(name, label, f"the shapes differ: {ours.shape} and {theirs.shape}")
    eps = float(jnp.finfo(dtype).eps)
    units = eps * np.broadcast_to(np.asarray(sensitivity, np.float64), oracles[0].shape)
    # NaN or infinity that float64 does not have is an error without bound, of the side that has
    # it alone; where both have it, the other elements are judged.
    spoiled = [_spoiled(ours, oracles[0]), _spoiled(theirs, oracles[1])]
    both = spoiled[0] & spoiled[1]
    jax_error, torch_error = (
        np.inf if (bad & ~both).any() else _worst(gaps(side, oracle), units)[0]
        for side, oracle, bad in zip((ours, theirs), oracles, spoiled, strict=True)
    )
    bound = factor * (2 * torch_error + slack)
    words = (
        f"JAX is {jax_error:.2g} and PyTorch {torch_error:.2g} eps of its sensitivity off float64"
    )
    words = places_that_differ(ours, oracles[0]) or places_that_differ(theirs, oracles[1]) or words
    finding = Finding(name, Verdict.AGREE, label, jax_error, torch_error, bound, words)
    if not jax_error <= bound:  # also for NaN
        return finding._replace(verdict=Verdict.JAX_WORSE, side="jax")
    if torch_error > factor * (2 * jax_error + slack):
        return finding._replace(verdict=Verdict.TORCH_WORSE, side="torch")
    if _agreeing(finding, oracles[0], units).explanation.startswith("no element"):
        return _agreeing(finding, oracles[0], units)
    if 2 * units.min(initial=0) > max(largest(oracles[0]), np.finfo(np.float64).tiny):
        words = f"rounding the inputs to {label} alone moves it by more than its own size"
        return finding._replace(verdict=Verdict.ILL_CONDITIONED, explanation=words)
    return finding


def the_wrong_one(jax_is_right: bool, torch_is_right: bool) -> Side:
    """Names the side that is wrong, if the other is right."""
    if jax_is_right == torch_is_right:
        return ""
    return "torch" if jax_is_right else "jax"


def places_that_differ(a: np.ndarray, b: np.ndarray) -> str:
    """Says how two arrays differ in shape or in the places of NaN and infinity, or nothing."""
    if a.shape != b.shape:
        return f"the shapes differ: {a.shape} and {b.shape}"
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return f"NaN in different places: {np.isnan(a).sum()} and {np.isnan(b).sum()}"
    infinite = np.where(np.isinf(a), a, 0), np.where(np.isinf(b), b, 0)
    return "" if np.array_equal(*infinite) else "infinities in different places"


def _ratio(distance: float, unit: float) -> float:
    return distance / unit if unit else (np.inf if distance else 0.0)


def _worst(gap: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """Returns the largest gap in units, and the unit there."""
    if not gap.size:
        return 0.0, 0.0
    safe = np.where(units > 0, units, 1.0)
    ratios = np.where(units > 0, gap / safe, np.where(gap > 0, np.inf, 0.0))
    ratios = np.where(np.isnan(units), np.nan, ratios)
    place = int(np.argmax(ratios))  # NaN counts as the largest
    return float(ratios.flat[place]), float(units.flat[place])


def unit_of_worst(ours: np.ndarray, theirs: np.ndarray, magnitude: float | np.ndarray) -> float:
    """Returns the magnitude of the element that is furthest off in its units."""
    if ours.shape != theirs.shape:
        return float(np.max(magnitude))
    units = np.broadcast_to(np.asarray(magnitude, np.float64), ours.shape)
    return _worst(gaps(ours, theirs), units)[1]


def _spoiled(side: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Returns where a side has NaN or infinity that its float64 run has not, or the reverse."""
    a, b = np.asarray(side, np.float64), np.asarray(oracle, np.float64)
    infinite = np.where(np.isinf(a), a, 0) != np.where(np.isinf(b), b, 0)
    return infinite | (np.isnan(a) != np.isnan(b))


def gaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns absolute differences, 0 where either side is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    return np.abs(np.subtract(a, b, where=finite, out=np.zeros(a.shape)))


def distance_between(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest absolute difference of elements that are finite on both sides."""
    return float(np.max(gaps(a, b), initial=0))


def vanishes(oracle: np.ndarray, magnitude: np.ndarray, dtype: np.dtype) -> bool:
    """Whether a gradient is what is left of terms that cancel, down to the last digit of a dtype.

    Batch normalisation of two samples has such gradients; a poor algorithm shows in the output.
    """
    common = float(magnitude.min(initial=np.inf))
    return bool(largest(oracle) <= CANCELLED * float(jnp.finfo(dtype).eps) * common)


def of_cancelling(
    name: str, unit: np.ndarray, oracle: np.ndarray, magnitude: np.ndarray, dtype: DTypeLike
) -> np.ndarray:
    """Returns units in which each element of a gradient that vanishes is judged by its terms.

    Attention's packed bias has such elements among others: those of the keys, which softmax does
    not see. Which side is further off there is chance.

    Args:
      name: of the quantity; all but gradients keep their units.
      unit: of the quantity, or of each element.
      oracle: the float64 value.
      magnitude: M of the quantity, or of each element.
      dtype: the precision judged.
    """
    if not name.startswith("grad "):
        return unit
    gone = np.abs(oracle) <= CANCELLED * float(jnp.finfo(dtype).eps) * np.asarray(magnitude)
    return np.where(gone, np.maximum(unit, magnitude), unit)


def excused(finding: Finding, spread: np.ndarray, unit: np.ndarray) -> bool:
    """Whether a side's error is within twice what rounding every operation does."""
    errors = max(finding.jax_error, finding.torch_error)
    return errors * float(unit.max(initial=0)) <= 2 * float(spread.max(initial=0))


def by_chance(finding: Finding) -> Finding:
    """Returns a suspicion that inputs nearby did not confirm."""
    words = (
        "larger than the bound on these inputs and not on others nearby: a value on a kink "
        "(ReLU, max) or chance in the last digit"
    )
    return finding._replace(verdict=Verdict.ILL_CONDITIONED, side="", explanation=words)


def other_dtype(name: str, kind: str, ours: np.ndarray, theirs: np.ndarray) -> Finding | None:
    """Returns the finding that what is passed on has two dtypes, and which is not the inputs'."""
    passed_on = name.startswith(_PASSED_ON) and not name.startswith("after")
    if not passed_on or ours.dtype == theirs.dtype or not is_float(ours):
        return None
    words = f"the dtypes differ: {ours.dtype} and {theirs.dtype}"
    side = the_wrong_one(ours.dtype.name == kind, theirs.dtype.name == kind)
    return differ(name, kind, words, side)


def outvoted(
    ours: np.ndarray, theirs: np.ndarray, third: np.ndarray, magnitude: np.ndarray
) -> Side:
    """Returns the side that disagrees with the witness, if the other agrees with it."""
    right = [judge_semantics("", side, third, magnitude).passed for side in (ours, theirs)]
    return the_wrong_one(*right)
