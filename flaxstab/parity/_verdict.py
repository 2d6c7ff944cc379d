"""Judges one quantity computed by both frameworks at two precisions."""

from enum import StrEnum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxstab._typing import DTypeLike

SEMANTICS = 1e-12  # of the magnitude, in float64: 4,500 eps (DESIGN, "How parity is judged")


class Verdict(StrEnum):
    """What the comparison of one quantity found."""

    AGREE = "agree"
    JAX_WORSE = "jax_worse"
    TORCH_WORSE = "torch_worse"
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
      explanation: one sentence.
    """

    name: str
    verdict: Verdict
    dtype: str
    jax_error: float
    torch_error: float
    explanation: str

    @property
    def passed(self) -> bool:
        """Whether JAX's side is as it should be."""
        return self.verdict in (Verdict.AGREE, Verdict.TORCH_WORSE)


def judge_semantics(name: str, ours: np.ndarray, theirs: np.ndarray, magnitude: float) -> Finding:
    """Judges a float64 quantity: both sides must agree to 1e-12 of its magnitude.

    Args:
      name: the quantity.
      ours: JAX's value.
      theirs: PyTorch's value.
      magnitude: M of the quantity.
    """
    mismatch = _mismatch(ours, theirs)
    if mismatch:
        return Finding(name, Verdict.SEMANTICS_DIFFER, "float64", np.inf, np.inf, mismatch)
    distance = _distance(ours, theirs)
    error = _ratio(distance, magnitude)
    verdict = Verdict.AGREE if error <= SEMANTICS else Verdict.SEMANTICS_DIFFER
    words = f"the sides differ by {error:.1e} of the magnitude {magnitude:.1e} in float64"
    return Finding(name, verdict, "float64", error, error, words)


def judge_numerics(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    oracle: np.ndarray,
    sensitivity: float,
    dtype: DTypeLike,
) -> Finding:
    """Judges a low-precision quantity: our error may be 2x torch's plus 2 eps of the sensitivity.

    Args:
      name: the quantity.
      ours: JAX's value at the dtype.
      theirs: PyTorch's value at the dtype.
      oracle: the float64 value for the same inputs.
      sensitivity: of the quantity to its inputs.
      dtype: the precision judged.
    """
    label = np.dtype(dtype).name
    if ours.shape != oracle.shape or theirs.shape != oracle.shape:
        words = f"the shapes differ: {ours.shape} and {theirs.shape}"
        return Finding(name, Verdict.SEMANTICS_DIFFER, label, np.inf, np.inf, words)
    unit = float(jnp.finfo(dtype).eps) * sensitivity
    # NaN or infinity that float64 does not have is an error without bound, of that side.
    jax_error, torch_error = (
        np.inf if _mismatch(side, oracle) else _ratio(_distance(side, oracle), unit)
        for side in (ours, theirs)
    )
    verdict = Verdict.AGREE
    if not jax_error <= 2 * torch_error + 2:  # also for NaN
        verdict = Verdict.JAX_WORSE
    elif torch_error > 2 * jax_error + 2:
        verdict = Verdict.TORCH_WORSE
    figures = f"JAX is {jax_error:.2g} and PyTorch {torch_error:.2g} eps of its sensitivity off"
    words = _mismatch(ours, oracle) or _mismatch(theirs, oracle) or f"{figures} float64"
    return Finding(name, verdict, label, jax_error, torch_error, words)


def _ratio(distance: float, unit: float) -> float:
    return distance / unit if unit else (np.inf if distance else 0.0)


def _mismatch(a: np.ndarray, b: np.ndarray) -> str:
    """Says how two arrays differ in shape or in the places of NaN and infinity, or nothing."""
    if a.shape != b.shape:
        return f"the shapes differ: {a.shape} and {b.shape}"
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return f"NaN in different places: {np.isnan(a).sum()} and {np.isnan(b).sum()}"
    infinite = np.where(np.isinf(a), a, 0), np.where(np.isinf(b), b, 0)
    return "" if np.array_equal(*infinite) else "infinities in different places"


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    return float(np.max(np.abs(np.subtract(a, b, where=finite, out=np.zeros(a.shape))), initial=0))
