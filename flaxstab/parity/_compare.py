"""Compares a Flax module with a PyTorch module: semantics in float64, numerics against it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike
from flaxstab.parity._flax_side import FlaxSide
from flaxstab.parity._inputs import Inputs, Layout
from flaxstab.parity._magnitude import magnitude, sensitivity
from flaxstab.parity._torch_side import TorchSide
from flaxstab.parity._verdict import Finding, Verdict, judge_numerics, judge_semantics

if TYPE_CHECKING:
    import torch


_PASSED_ON = ("output", "evaluation", "grad input")  # what the next layer sees the dtype of


class Report(NamedTuple):
    """What a comparison found.

    Attributes:
      findings: one per quantity and precision.
    """

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether JAX's side is as it should be in every quantity."""
        return all(finding.passed for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The finding to look at first."""
        return max(self.findings, key=lambda f: (not f.passed, f.jax_error))

    def __str__(self) -> str:
        failed = [f for f in self.findings if not f.passed] or [self.worst]
        lines = [f"{f.verdict}: {f.name} ({f.dtype}): {f.explanation}" for f in failed[:12]]
        return "\n".join([*lines, f"{len(self.findings)} quantities compared"])


def compare(
    flax_side: nnx.Module | Callable[..., Array],
    torch_side: "torch.nn.Module | Callable[..., torch.Tensor]",
    *inputs: np.ndarray,
    layout: Layout = None,
    dtypes: tuple[DTypeLike, ...] = (np.float32,),
    seed: int = 0,
) -> Report:
    """Compares a Flax module or JAX function with its PyTorch counterpart.

    The weights are carried from torch to a copy of the Flax module; both run in training mode on
    the same inputs. Compared are the output, input and parameter gradients for a random
    cotangent, every buffer after 1, 2 and 10 steps, and evaluation after them: first in float64,
    where both must agree to 1e-12 of each quantity's magnitude, then at each of ``dtypes``, where
    our error against float64 may be twice torch's plus 2 eps of the sensitivity, and outputs and
    input gradients must have torch's dtype. Weights and statistics are rounded to the dtype first;
    layers with running statistics keep float32 on both sides.

    Dropout layers drop the same elements on both sides: torch's ``Dropout`` replays the masks of
    the :class:`flaxstab.dropout.Dropout` of the same name.

    Args:
      flax_side: a module or a function of arrays.
      torch_side: its counterpart.
      *inputs: arrays for both sides, features last; floating-point ones are differentiated.
      layout: ``'image'`` moves the last axis to 1 for torch's inputs, and its outputs and input
        gradients back; ``None`` gives both sides the same arrays. Never guessed.
      dtypes: the lower precisions to judge.
      seed: of the cotangent.

    Returns:
      One finding per quantity and precision.

    Raises:
      ValueError: if the weights do not fit, the sides compute different quantities, or a dropout
        layer has no counterpart.
    """
    check(layout in ("image", None), "layout must be 'image' or None", layout=layout)
    arrays = tuple(interop.to_numpy(array) for array in inputs)
    ours, theirs = FlaxSide(flax_side), TorchSide(torch_side)
    ours.load(theirs.state_dict())
    shape = ours.output_shape(arrays)
    cotangent = np.random.default_rng(seed).normal(size=shape)
    fed = Inputs(arrays, cotangent, layout)
    # Two programs of one meaning may differ by the rounding of their terms; how accurate ours
    # should be is a matter of the function alone, or a poor algorithm would excuse itself.
    terms = ours.sizes(fed, magnitude)
    findings = _judge_semantics(ours, theirs, fed, terms)
    inherent = ours.sizes(fed, sensitivity) if dtypes else {}
    for dtype in dtypes:
        rounded = theirs.rounded(dtype)
        ours.load(rounded.state_dict())
        findings += _judge_numerics(ours, rounded, fed.rounded(dtype), dtype, inherent)
    return Report(tuple(findings))


def _judge_semantics(
    ours: FlaxSide, theirs: TorchSide, fed: Inputs, sizes: Mapping[str, float]
) -> list[Finding]:
    oracle = theirs.run(fed, np.float64, ours.target)
    values = ours.run(fed, np.float64)
    missing = [name for name in oracle if name not in values]
    refused = [name for name in missing if not name.startswith("step ")]
    if refused:
        raise ValueError(
            f"both sides must compute the same quantities, got none of {', '.join(refused)} "
            "on the Flax side. Give both modules the same layers."
        )
    differ = Verdict.SEMANTICS_DIFFER
    absent = [Finding(n, differ, "float64", np.inf, np.inf, "only PyTorch has it") for n in missing]
    shared = [judge_semantics(n, a, oracle[n], sizes[n]) for n, a in values.items() if n in oracle]
    return [*shared, *absent]


def _judge_numerics(
    ours: FlaxSide, theirs: TorchSide, fed: Inputs, dtype: DTypeLike, sizes: Mapping[str, float]
) -> list[Finding]:
    oracle = theirs.run(fed, np.float64, ours.target)
    low, torch_low = ours.run(fed, dtype), theirs.run(fed, dtype, ours.target)
    kind, findings = jnp.dtype(dtype), []
    floats = [n for n in oracle if n in low and np.issubdtype(oracle[n].dtype, np.floating)]
    for name in floats:
        sides = low[name], torch_low[name]
        if name.startswith(_PASSED_ON) and sides[0].dtype != sides[1].dtype:
            words = f"the dtypes differ: {sides[0].dtype} and {sides[1].dtype}"
            differ = Verdict.SEMANTICS_DIFFER
            findings.append(Finding(name, differ, kind.name, np.inf, np.inf, words))
        else:
            findings.append(judge_numerics(name, *sides, oracle[name], sizes[name], kind))
    return findings
