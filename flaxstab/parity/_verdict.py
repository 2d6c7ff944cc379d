"""Judges one quantity computed by both frameworks at two precisions."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import largest

SEMANTICS = 1e-12  # of the magnitude, in float64: 4,500 eps (DESIGN, "How parity is judged")
BLIND = 1e-6  # of a quantity's size: a float64 bound above this compares fewer than 6 digits

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
    name: str, ours: np.ndarray, theirs: np.ndarray, magnitude: float, factor: float = 1.0
) -> Finding:
    """Judges a float64 quantity: both sides must agree to 1e-12 of its magnitude.

    Args:
      name: the quantity.
      ours: JAX's value.
      theirs: PyTorch's value.
      magnitude: M of the quantity.
      factor: by which somebody, with a reason, widens the bound.
    """
    mismatch = places_that_differ(ours, theirs)
    if mismatch:
        return differ(name, "float64", mismatch)
    error = _ratio(distance_between(ours, theirs), magnitude)
    bound = SEMANTICS * factor
    words = f"the sides differ by {error:.1e} of the magnitude {magnitude:.1e} in float64"
    if not error <= bound:  # also for NaN
        kind = Verdict.SEMANTICS_DIFFER
        return Finding(name, kind, "float64", error, error, bound, words)
    size, kind = largest(theirs), Verdict.AGREE
    if bound * magnitude > BLIND * size:
        kind = Verdict.ILL_CONDITIONED
        words = _cancelling(size, magnitude)
    return Finding(name, kind, "float64", error, error, bound, words)


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
    sensitivity: float,
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
      sensitivity: of the quantity to its inputs.
      dtype: the precision judged.
      factor: by which somebody, with a reason, widens the bound.
      slack: the eps of the sensitivity that are allowed beside twice the other side's error.
    """
    label = np.dtype(dtype).name
    if ours.shape != oracles[0].shape or theirs.shape != oracles[1].shape:
        return differ(name, label, f"the shapes differ: {ours.shape} and {theirs.shape}")
    eps = float(jnp.finfo(dtype).eps)
    # NaN or infinity that float64 does not have is an error without bound, of that side.
    jax_error, torch_error = (
        np.inf
        if places_that_differ(side, oracle)
        else _ratio(distance_between(side, oracle), eps * sensitivity)
        for side, oracle in zip((ours, theirs), oracles, strict=True)
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
    if 2 * eps * sensitivity > max(largest(oracles[0]), np.finfo(np.float64).tiny):
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


def distance_between(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest absolute difference of elements that are finite on both sides."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    return float(np.max(np.abs(np.subtract(a, b, where=finite, out=np.zeros(a.shape))), initial=0))
