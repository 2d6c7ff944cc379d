"""Compares two models or functions: semantics in float64, numerics against it."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import DTypeLike
from flaxstab.parity._alone import Programs
from flaxstab.parity._carry import Weights, carry
from flaxstab.parity._flax_side import FlaxSide
from flaxstab.parity._inputs import Inputs, Layout, Values, is_float, largest, own_rng
from flaxstab.parity._layers import Search
from flaxstab.parity._locator import Locator
from flaxstab.parity._options import lower
from flaxstab.parity._precision import Precision
from flaxstab.parity._program import NNXProgram, program
from flaxstab.parity._replay import check_silent
from flaxstab.parity._report import Report, Tolerance, factor_of
from flaxstab.parity._torch_side import Rename, TorchSide
from flaxstab.parity._verdict import (
    SEMANTICS,
    Finding,
    Side,
    Verdict,
    by_chance,
    differ,
    excused,
    judge_numerics,
    judge_semantics,
    of_cancelling,
    other_dtype,
    outvoted,
    repeated_draws,
    unit_of_worst,
    vanishes,
)

if TYPE_CHECKING:
    import torch

_REDRAWS = 2


class Pair:
    """Two models or functions, compiled once and compared on as many inputs as one likes.

    Args:
      flax_side: an ``nnx.Module``, a :class:`Linen`, or a function.
      torch_side: its counterpart, or what was recorded of it.
      inputs: as they will be given to :meth:`judge`; their shapes count.
      layout: see :func:`compare`.
      weights: see :func:`compare`.
      rename: see :func:`compare`.
      witness: see :func:`compare`.

    Raises:
      ValueError: if the weights do not fit or a side cannot run.
    """

    def __init__(
        self,
        flax_side: object,
        torch_side: "torch.nn.Module | Callable[..., torch.Tensor] | TorchSide",
        inputs: Sequence[np.ndarray],
        *,
        layout: Layout = None,
        weights: Weights = "torch",
        rename: Rename | None = None,
        witness: "torch.nn.Module | Callable[..., torch.Tensor] | None" = None,
    ) -> None:
        self._layout: Layout = layout
        self._program = program(flax_side, tuple(inputs))
        given = torch_side if isinstance(torch_side, TorchSide) else None
        self._torch = given or TorchSide(torch_side, rename)
        self._ignored = carry(self._program, self._torch, weights)
        self._without = tuple(f" {name}" for name in self._ignored)
        self._flax = FlaxSide(self._program)
        self._shapes = self._flax.output_shapes(tuple(inputs))
        self._witness = None if witness is None else TorchSide(witness, rename)
        if self._witness is not None:
            self._witness.load(self._torch.tensors() if self._witness.module is not None else {})
        made = self._program
        self.programs = Programs()  # of layers, alone
        self.magnitudes: Values | None = None  # if they are known from a pair like this one
        self._drawing = made.module if isinstance(made, NNXProgram) else None
        if self._drawing is None and self._torch.module is not None:
            check_silent(self._torch.module)

    def judge(
        self,
        inputs: Sequence[np.ndarray],
        *,
        dtypes: Sequence[DTypeLike] = (np.float32,),
        tolerances: tuple[Tolerance, ...] = (),
        seed: int = 0,
    ) -> Report:
        """Compares both sides on some inputs; see :func:`compare`."""
        fed = self.fed(inputs, seed)
        kinds, stored = lower(fed.arrays, dtypes)
        exact = self._exact(fed, stored)
        magnitudes = self.magnitudes or self._flax.magnitudes(
            exact.fed, exact.ours, exact.precision
        )
        findings = self._semantics(exact, magnitudes, tolerances)
        for kind in kinds:
            oracle = exact if kind == stored else self._exact(fed, kind)
            findings += self._numerics(fed, oracle, kind, magnitudes, tolerances)
        check(bool(findings), "there must be something to compare", outputs=[*exact.ours])
        notes = [f"{name} (the Flax layer does without)" for name in self._ignored]
        if dtypes and self._drawing is not None and _has_stock_dropout(self._drawing):
            notes.append(
                "float32 and below behind nnx.Dropout (its mask depends on JAX's x64 mode)"
            )
        unused = (
            t for t in tolerances if not any(fnmatchcase(f.name, t.pattern) for f in findings)
        )
        notes += [f"the tolerance for {t.pattern!r} (no quantity has such a name)" for t in unused]
        where = Search(lambda: self.locator(fed).locate(free=False, stop=True))
        return Report(
            tuple(findings), tuple(notes), tolerances,
            pinned=self._program.pinned(), where=where if self._layered() else None,
        )  # fmt: skip

    def fed(self, inputs: Sequence[np.ndarray], seed: int) -> Inputs:
        """Returns what both sides are fed: the inputs, and cotangents of the outputs."""
        rng = own_rng(seed)
        cotangents = {name: rng.normal(size=shape) for name, shape in self._shapes.items()}
        return Inputs(tuple(inputs), cotangents, self._layout)

    @property
    def torch_module(self) -> "torch.nn.Module":
        """PyTorch's module, the copy that is run.

        Raises:
          ValueError: if that side is a function.
        """
        if self._torch.module is None:
            raise ValueError("torch_side must be a module here, got a function.")
        return self._torch.module

    def measured(self, inputs: Sequence[np.ndarray], seed: int) -> Values:
        """Returns the magnitudes of what :meth:`judge` compares without lower precisions."""
        exact = self._exact(self.fed(inputs, seed), np.float64)
        return self._flax.magnitudes(exact.fed, exact.ours, exact.precision)

    def _layered(self) -> bool:
        """Whether there are layers, on both sides, that one may look at."""
        module = self._torch.module
        layers = module is not None and next(module.children(), None) is not None
        return layers and isinstance(self._program, NNXProgram)

    def locator(self, fed: Inputs, dtype: DTypeLike = np.float64) -> Locator:
        """Returns what compares both models layer by layer.

        Args:
          fed: what both are given.
          dtype: see :func:`locate`.

        Raises:
          ValueError: if a side is no module of layers.
        """
        if not isinstance(self._program, NNXProgram) or self._torch.module is None:
            raise ValueError(
                "layers are found in an nnx.Module and a torch.nn.Module, got another kind of "
                "side. Compare these as a whole, with parity.compare."
            )
        return Locator(self._program, self._torch, fed, dtype, self.programs)

    def sides(self) -> "tuple[nnx.Module | None, torch.nn.Module | None]":
        """Returns both sides with the weights that they are compared with; None for functions."""
        made = self._program
        flax = nnx.clone(made.module) if isinstance(made, NNXProgram) else None
        return flax, self._torch.module

    def allowance(
        self, inputs: Sequence[np.ndarray], name: str, dtype: DTypeLike, seed: int = 0
    ) -> float:
        """Returns what rounding may do to a quantity, over its largest value.

        Args:
          inputs: as :meth:`judge` had them, rounded already.
          name: of the quantity.
          dtype: float64: how much the sides may differ there; else what JAX's error may be beside
            twice PyTorch's.
          seed: as :meth:`judge` had it.
        """
        exact = self._exact(self.fed(inputs, seed), dtype)
        theirs = exact.theirs[name]
        if jnp.dtype(dtype) == np.float64:
            units = self._flax.magnitudes(exact.fed, exact.ours, exact.precision)[name]
            unit = SEMANTICS * unit_of_worst(exact.ours[name], theirs, units)
        else:
            units = self._flax.sensitivities(exact.fed, exact.ours, exact.precision)[name]
            unit = 2 * float(jnp.finfo(dtype).eps) * float(np.max(units))
        return unit / max(largest(theirs), np.finfo(np.float64).tiny)

    def _exact(self, fed: Inputs, stored: DTypeLike) -> "_Exact":
        """Runs both sides in float64 on numbers rounded to a dtype."""
        fed, precision = fed.rounded(stored), Precision(np.float64, stored)
        theirs = self._torch.run(fed, precision, self._drawing)
        repeated = repeated_draws(self._torch.draws.repeated)
        return _Exact(fed, precision, self._flax.run(fed, precision), theirs, repeated)

    def _semantics(
        self, exact: "_Exact", magnitudes: Values, tolerances: tuple[Tolerance, ...]
    ) -> list[Finding]:
        ours, theirs = exact.ours, exact.theirs
        findings = [
            (factor_of(n, tolerances) == 1 and other_dtype(n, "float64", a, theirs[n]))
            or judge_semantics(n, a, theirs[n], magnitudes[n], factor_of(n, tolerances))
            for n, a in ours.items()
            if n in theirs
        ]
        findings += [differ(n, "float64", "only PyTorch has it") for n in self._only(theirs, ours)]
        findings += [differ(n, "float64", "only Flax has it") for n in self._only(ours, theirs)]
        if not all(f.passed for f in findings):
            findings = self._attributed(findings, exact, magnitudes)
        return findings + exact.repeated

    def _only(self, one: Values, other: Values) -> list[str]:
        alone = [n for n in one if n not in other and not n.endswith(self._without)]
        # A function has no training steps; that a module beside it has some says nothing.
        return [n for n in alone if not re.match(r"step \d+ output", n)]

    def _attributed(
        self,
        findings: list[Finding],
        exact: "_Exact",
        magnitudes: Values,
    ) -> list[Finding]:
        """Names the side at fault, by the witness or, for a gradient, by the outputs' slope."""
        third: Values = {}
        if self._witness is not None:
            third = self._witness.run(exact.fed, exact.precision, self._drawing)
        ours, theirs = exact.ours, exact.theirs
        same_outputs = all(f.passed for f in findings if f.name.startswith("output"))

        def side(name: str) -> Side:
            if name in third and name in ours and name in theirs:
                # Of a result that a fault made constant, JAX's magnitude is 0.
                size = np.maximum(magnitudes[name], largest(third[name]))
                return outvoted(ours[name], theirs[name], third[name], size)
            if name.startswith("grad ") and same_outputs and name in ours and name in theirs:
                return self._off_slope(exact.fed, name, ours[name], theirs[name])
            return ""

        return [f if f.passed or f.side else f._replace(side=side(f.name)) for f in findings]

    def _off_slope(self, fed: Inputs, name: str, ours: np.ndarray, theirs: np.ndarray) -> Side:
        if ours.shape != theirs.shape or self._torch.recorded:
            return ""
        direction = own_rng(0).normal(size=ours.shape)
        slope = self._torch.slope(fed, name, direction, self._drawing)
        errors = [abs(float(np.sum(direction * grad)) - slope) for grad in (ours, theirs)]
        if not min(errors) * 10 < max(errors):  # neither is the slope, or both are, or it is a kink
            return ""
        return "jax" if errors[0] > errors[1] else "torch"

    def _numerics(
        self,
        fed: Inputs,
        exact: "_Exact",
        dtype: DTypeLike,
        magnitudes: Values,
        tolerances: tuple[Tolerance, ...],
    ) -> list[Finding]:
        findings, units = self._numerics_once(exact, dtype, magnitudes, tolerances)
        for seed in range(0 if self._torch.recorded else _REDRAWS):
            suspects = [f.name for f in findings if f.side]
            if not suspects:
                break
            other = self._exact(fed.redrawn(seed), dtype)
            again, _ = self._numerics_once(other, dtype, magnitudes, tolerances)
            verdicts = {f.name: f.verdict for f in again}
            findings = [
                f if not f.side or verdicts[f.name] is f.verdict else by_chance(f) for f in findings
            ]
        if jnp.finfo(dtype).bits == 16 and any(f.side for f in findings):
            findings = self._within_spread(findings, units, exact, dtype)
        if any(f.side == "jax" for f in findings):
            findings = self._without_fast_matmul(findings, exact, dtype, magnitudes, tolerances)
        return findings

    def _within_spread(
        self, findings: list[Finding], units: Values, exact: "_Exact", dtype: DTypeLike
    ) -> list[Finding]:
        """Recognises what rounding to 16 bits does to any program: values cross kinks often.

        Args:
          findings: with errors as multiples of ``units``.
          units: by which each was judged.
          exact: the float64 runs.
          dtype: the one judged.
        """
        spreads = self._flax.spreads(exact.fed, exact.ours, exact.precision, dtype)
        words = f"rounding every operation to {jnp.dtype(dtype).name} does as much (kinks, sums)"
        kind = Verdict.ILL_CONDITIONED
        return [
            f._replace(verdict=kind, side="", explanation=words)
            if f.side and excused(f, spreads[f.name], units[f.name])
            else f
            for f in findings
        ]

    def _without_fast_matmul(
        self,
        findings: list[Finding],
        exact: "_Exact",
        dtype: DTypeLike,
        magnitudes: Values,
        tolerances: tuple[Tolerance, ...],
    ) -> list[Finding]:
        """Recognises JAX's default matmul precision, which is no fault of the program."""
        with jax.default_matmul_precision("highest"):
            found, _ = self._numerics_once(exact, dtype, magnitudes, tolerances)
        again = {f.name: f for f in found}
        words = (
            "agrees with jax.default_matmul_precision('highest'); at the precision that is set, "
            "matrix products (TF32 or bfloat16) are less exact than PyTorch's"
        )
        return [
            f._replace(verdict=Verdict.AGREE, side="", explanation=words)
            if f.side == "jax" and again[f.name].passed
            else f
            for f in findings
        ]

    def _numerics_once(
        self,
        exact: "_Exact",
        dtype: DTypeLike,
        magnitudes: Values,
        tolerances: tuple[Tolerance, ...],
    ) -> tuple[list[Finding], Values]:
        """Returns the findings, and the unit of each one's errors: see ``judge_numerics``."""
        low = self._low(exact, dtype, magnitudes)
        return self._judged(low, exact, dtype, tolerances), low.units

    def _low(self, exact: "_Exact", dtype: DTypeLike, magnitudes: Values) -> "_Low":
        """Runs both sides at a lower precision."""
        fed, low = exact.fed, Precision(dtype, dtype)
        ours, theirs = self._flax.run(fed, low), self._torch.run(fed, low, self._drawing)
        sensitivities = self._flax.sensitivities(fed, exact.ours, exact.precision)
        units: dict[str, np.ndarray] = {}
        for name in (n for n in ours if n in theirs and is_float(exact.ours[n])):
            unit, oracle = sensitivities[name], exact.ours[name]
            if name.startswith("grad ") and vanishes(oracle, magnitudes[name], jnp.dtype(dtype)):
                unit = np.maximum(unit, magnitudes[name])
            if self._torch.recorded:  # no other inputs can be tried, as _numerics does
                unit = of_cancelling(name, unit, oracle, magnitudes[name], dtype)
            units[name] = unit
        return _Low(ours, theirs, units)

    def _judged(
        self, low: "_Low", exact: "_Exact", dtype: DTypeLike, tolerances: tuple[Tolerance, ...]
    ) -> list[Finding]:
        kind, findings = jnp.dtype(dtype), []
        for name, unit in low.units.items():
            # Each side is held to its own float64 result: what programs mean is judged already.
            sides = low.ours[name], low.theirs[name]
            oracles, factor = (exact.ours[name], exact.theirs[name]), factor_of(name, tolerances)
            findings.append(
                other_dtype(name, kind.name, *sides)
                or judge_numerics(name, *sides, oracles, unit, kind, factor)
            )
        return findings


class _Exact(NamedTuple):
    """Both sides' float64 results: compared for meaning, and the oracles of lower precisions."""

    fed: Inputs
    precision: Precision
    ours: Values
    theirs: Values
    repeated: list[Finding]


class _Low(NamedTuple):
    """Both sides' results at a lower precision, and the units of their errors."""

    ours: Values
    theirs: Values
    units: Values


def _has_stock_dropout(model: nnx.Module) -> bool:
    modules = (module for _, module in nnx.iter_modules(model))
    return any(isinstance(module, nnx.Dropout) and module.rate > 0 for module in modules)
