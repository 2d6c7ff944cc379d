"""Judges one layer of a pair of models alone, as the harness judges whole models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._typing import DTypeLike, PyTree
from flaxstab.parity._alone import Fed, FlaxLayer, Programs, TorchLayer
from flaxstab.parity._calls import Asked, Call
from flaxstab.parity._fit import Fit, UnfitError, fit, outputs_of, unmatched
from flaxstab.parity._inputs import Layout, Values, is_float, largest
from flaxstab.parity._magnitude import BITS, UNIT, sizes
from flaxstab.parity._precision import Precision
from flaxstab.parity._torch_side import Rename
from flaxstab.parity._verdict import (
    Finding,
    Verdict,
    by_chance,
    differ,
    excused,
    judge_numerics,
    judge_semantics,
    vanishes,
)

if TYPE_CHECKING:
    import torch

_REDRAWS = 2


class Found(NamedTuple):
    """What came of one layer.

    Attributes:
      findings: of every quantity, call and mode.
      units: by which each call's outputs and their cotangents were judged, one pair per call.
      moved: which outputs of each call PyTorch has with the channels at axis 1.
      notes: what could not be judged.
    """

    findings: tuple[Finding, ...]
    units: tuple[tuple[np.ndarray, ...], ...]
    moved: tuple[tuple[bool, ...], ...]
    notes: tuple[str, ...]


class _Run(NamedTuple):
    """One call with everything that decides its result."""

    fitted: Fit
    outputs: tuple[bool | None, ...]
    rest: PyTree
    training: bool


class LayerPair:
    """One layer of each side.

    Args:
      flax: Flax's layer.
      exact: PyTorch's in float64.
      low: PyTorch's at a lower precision, if that is judged, too.
      layout: see :func:`compare`.
      rename: from the PyTorch layer's own names to the Flax layer's.
      programs: shared by the layers of a model.
      dtype: the lower precision; float64 if none is judged.
    """

    def __init__(
        self,
        flax: nnx.Module,
        exact: "torch.nn.Module",
        low: "torch.nn.Module | None",
        *,
        layout: Layout,
        rename: Rename,
        programs: Programs,
        dtype: DTypeLike,
    ) -> None:
        self._flax, self._layout, self._dtype = FlaxLayer(flax, programs, dtype), layout, dtype
        self._exact = TorchLayer(exact, layout, rename)
        self._low = None if low is None else TorchLayer(low, layout, rename)

    def judge(
        self,
        training: Sequence[tuple[Call, Asked | None]],
        evaluation: Sequence[tuple[Call, Asked | None]],
    ) -> Found:
        """Judges the layer's calls in training one after the other, then those in evaluation.

        Args:
          training: PyTorch's calls, each with Flax's, if that is known.
          evaluation: the same in evaluation mode.

        Raises:
          UnfitError: if calls do not match, if PyTorch's layer alone gives another result, or if
            one differs whose calls have keywords that cannot be matched by name.
        """
        rest, findings, units, notes = self._flax.start, [], [], []
        moves: list[tuple[bool, ...]] = []
        # A layer without modes and statistics does the same in evaluation.
        later = evaluation if self._flax.has_modes else ()
        for is_training, calls in ((True, training), (False, later)):
            for theirs, ours in calls:
                run = self._run(theirs, ours, rest, training=is_training)
                if None in run.outputs:
                    findings.append(self._other_shape(theirs, run))
                    break
                fed, note = self._fed(theirs, run)
                found, sizes_of, rest = self._call(theirs, run, fed)
                findings += found if is_training else _evaluated(found)
                if is_training:
                    units.append(sizes_of)
                    moves.append(tuple(map(bool, run.outputs)))
                    notes += [note] if note else []
        if any(not f.passed or f.side for f in findings):
            self._check_keywords([*training, *later])
        return Found(tuple(findings), tuple(units), tuple(moves), tuple(dict.fromkeys(notes)))

    def _check_keywords(self, calls: Sequence[tuple[Call, Asked | None]]) -> None:
        """Refuses to charge a layer that the two models may call differently."""
        flax = self._flax.module
        names = {n for call in calls for n in unmatched(*call, self._exact.module, flax)}
        if names:
            raise UnfitError(f"the calls' keywords differ: {', '.join(sorted(names))}")

    def _run(self, theirs: Call, ours: Asked | None, rest: PyTree, *, training: bool) -> _Run:
        module = self._exact.module
        fitted = fit(theirs, ours, module, self._layout)
        fed = Fed(fitted.arrays, None)
        shapes = self._flax.shapes(fitted.ours, fed, rest, training=training)
        return _Run(
            fitted, outputs_of(theirs.outputs, shapes, module, self._layout), rest, training
        )

    def _other_shape(self, theirs: Call, run: _Run) -> Finding:
        fed = Fed(run.fitted.arrays, None)
        shapes = self._flax.shapes(run.fitted.ours, fed, run.rest, training=run.training)
        given = [tuple(a.shape) for a in theirs.outputs]
        return differ("output", "float64", f"the shapes differ: {shapes} and {given} in PyTorch")

    def _fed(self, call: Call, run: _Run) -> tuple[Fed, str]:
        pulled = tuple(
            np.moveaxis(c, 1, -1) if moves else c
            for c, moves in zip(call.cotangents, run.outputs, strict=False)
        )
        if not run.training:
            return Fed(run.fitted.arrays, None), ""
        if not any(np.any(c) for c in pulled):
            return Fed(run.fitted.arrays, None), "no gradient reaches it"
        return Fed(run.fitted.arrays, pulled), ""

    def _call(
        self, call: Call, run: _Run, fed: Fed
    ) -> tuple[list[Finding], tuple[np.ndarray, ...], PyTree]:
        stored = self._dtype
        precision, fed = Precision(np.float64, stored), fed.rounded(stored)
        ours, after = self._ours(run, fed, precision)
        theirs = self._theirs(self._exact, run, fed, precision)
        if stored == np.float64:
            _check_alone(call, run, theirs)
        if ours.keys() != theirs.keys():
            only = sorted(ours.keys() ^ theirs.keys())
            raise UnfitError(f"only one side has {', '.join(only)}")
        sensitivities = self._sizes(ours, run, fed, precision, None)
        findings, units = self._semantics(ours, theirs, sensitivities, run, fed, precision)
        if self._low is not None:
            low = self._numerics(run, fed, ours, theirs, sensitivities, units)
            findings += low
        outputs = tuple(units[n] for n in units if n.startswith("output"))
        return findings, outputs, after

    def _ours(self, run: _Run, fed: Fed, precision: Precision) -> tuple[Values, PyTree]:
        return self._flax.run(run.fitted.ours, fed, run.rest, precision, training=run.training)

    def _theirs(self, layer: TorchLayer, run: _Run, fed: Fed, precision: Precision) -> Values:
        twin = self._flax.at(run.rest)
        return layer.run(run.fitted, fed, run.outputs, precision, twin, training=run.training)

    def _sizes(
        self, plain: Values, run: _Run, fed: Fed, precision: Precision, bits: int | None,
        unit: float = UNIT,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        moves = self._flax.moves(
            run.fitted.ours, fed, run.rest, precision, bits, unit, training=run.training
        )
        return sizes(plain, moves, unit)

    def _semantics(
        self, ours: Values, theirs: Values, sensitivities: Mapping[str, np.ndarray],
        run: _Run, fed: Fed, precision: Precision,
    ) -> tuple[list[Finding], Mapping[str, np.ndarray]]:  # fmt: skip
        """Judges in float64, by the sensitivity; by the magnitude where that is not enough."""
        units = sensitivities
        findings = [judge_semantics(n, a, theirs[n], units[n]) for n, a in ours.items()]
        if any(not f.passed for f in findings):
            units = self._sizes(ours, run, fed, precision, BITS)
            findings = [judge_semantics(n, a, theirs[n], units[n]) for n, a in ours.items()]
        return findings, units

    def _numerics(
        self, run: _Run, fed: Fed, ours: Values, theirs: Values,
        sensitivities: Mapping[str, np.ndarray], magnitudes: Mapping[str, np.ndarray],
    ) -> list[Finding]:  # fmt: skip
        """Judges a lower precision; a suspicion must be confirmed on inputs nearby."""
        exact = Precision(np.float64, self._dtype)
        findings = self._numerics_once(run, fed, ours, theirs, sensitivities, magnitudes)
        for seed in range(_REDRAWS):
            if not any(f.side for f in findings):
                return findings
            verdicts = {f.name: f.verdict for f in self._again(run, fed, seed, magnitudes)}
            findings = [
                f if not f.side or verdicts[f.name] is f.verdict else by_chance(f) for f in findings
            ]
        info = jnp.finfo(self._dtype)
        if info.bits > 16 or not any(f.side for f in findings):
            return findings
        spreads = self._sizes(ours, run, fed, exact, info.nmant, float(info.eps))
        return [
            f._replace(verdict=Verdict.ILL_CONDITIONED, side="")
            if f.side and excused(f, spreads[f.name], sensitivities[f.name])
            else f
            for f in findings
        ]

    def _again(
        self, run: _Run, fed: Fed, seed: int, magnitudes: Mapping[str, np.ndarray]
    ) -> list[Finding]:
        """Judges a lower precision on inputs nearby; PyTorch's buffers do not move."""
        if self._low is None:
            return []
        exact, near = Precision(np.float64, self._dtype), fed.redrawn(seed).rounded(self._dtype)
        with self._exact.undone(), self._low.undone():
            ours, _ = self._ours(run, near, exact)
            theirs = self._theirs(self._exact, run, near, exact)
            moved = self._sizes(ours, run, near, exact, None)
            return self._numerics_once(run, near, ours, theirs, moved, magnitudes)

    def _numerics_once(
        self, run: _Run, fed: Fed, ours: Values, theirs: Values,
        sensitivities: Mapping[str, np.ndarray], magnitudes: Mapping[str, np.ndarray],
    ) -> list[Finding]:  # fmt: skip
        low, kind = Precision(self._dtype, self._dtype), np.dtype(self._dtype)
        if self._low is None:
            return []
        mine, yours = self._ours(run, fed, low)[0], self._theirs(self._low, run, fed, low)
        findings = []
        for name in (n for n in mine if is_float(ours[n])):
            unit = sensitivities[name]
            if name.startswith("grad ") and vanishes(ours[name], magnitudes[name], kind):
                unit = np.maximum(unit, magnitudes[name])
            oracles = (ours[name], theirs[name])
            findings.append(judge_numerics(name, mine[name], yours[name], oracles, unit, kind))
        return findings


def _check_alone(call: Call, run: _Run, theirs: Values) -> None:
    """Refuses a PyTorch layer that alone computes something else than in the model."""
    alone = [a for name, a in theirs.items() if name.startswith("output")]
    for array, found, moves in zip(call.outputs, alone, run.outputs, strict=True):
        there = np.moveaxis(array, 1, -1) if moves else array
        if not judge_semantics("", there, found, largest(there)).passed:
            raise UnfitError("alone, PyTorch's layer gives another result than in the model")


def _evaluated(findings: Sequence[Finding]) -> list[Finding]:
    return [
        f._replace(
            name=f.name.replace("output", "evaluation", 1).replace("step 1", "after evaluation")
        )
        for f in findings
    ]
