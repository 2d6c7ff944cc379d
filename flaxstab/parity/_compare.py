"""Compares a Flax module with a PyTorch module: semantics in float64, numerics against it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._typing import Array, DTypeLike
from flaxstab.parity._flax_side import FlaxSide
from flaxstab.parity._inputs import Inputs, Layout, Values
from flaxstab.parity._magnitude import magnitude, sensitivity
from flaxstab.parity._torch_side import TorchSide
from flaxstab.parity._verdict import Finding, Verdict, judge_numerics, judge_semantics

if TYPE_CHECKING:
    import torch


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
    our error against float64 may be twice torch's plus 2 eps of the sensitivity.

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
      ValueError: if the weights do not fit, or the sides compute different quantities.
    """
    ours, theirs = FlaxSide(flax_side), TorchSide(torch_side)
    if isinstance(ours.target, nnx.Module):
        interop.load_state_dict(ours.target, theirs.state_dict())
    shape = ours.output_shape(inputs)
    cotangent = np.random.default_rng(seed).normal(size=shape)
    fed = Inputs(inputs, cotangent, layout)
    # Two programs of one meaning may differ by the rounding of their terms; how accurate ours
    # should be is a matter of the function alone, or a poor algorithm would excuse itself.
    terms = ours.sizes(fed, magnitude)
    inherent = ours.sizes(fed, sensitivity) if dtypes else {}
    findings: list[Finding] = []
    for dtype in (np.float64, *dtypes):
        findings += _judge(
            ours, theirs, fed.rounded(dtype), dtype, terms if dtype == np.float64 else inherent
        )
    return Report(tuple(findings))


def _judge(
    ours: FlaxSide, theirs: TorchSide, fed: Inputs, dtype: DTypeLike, sizes: Mapping[str, float]
) -> list[Finding]:
    oracle = theirs.run(fed, np.float64)
    if dtype == np.float64:
        values = _matching(ours.run(fed, dtype), oracle)
        return [judge_semantics(n, values[n], oracle[n], sizes[n]) for n in oracle]
    low, torch_low = ours.run(fed, dtype), theirs.run(fed, dtype)
    kind = jnp.dtype(dtype)
    return [
        judge_numerics(n, low[n], torch_low[n], oracle[n], sizes[n], kind)
        for n in oracle
        if np.issubdtype(oracle[n].dtype, np.floating)
    ]


def _matching(ours: Values, theirs: Values) -> Values:
    missing = [name for name in theirs if name not in ours]
    if missing:
        raise ValueError(
            f"both sides must compute the same quantities, got none of {', '.join(missing)} "
            "on the Flax side. Give both modules the same layers."
        )
    return ours


__all__ = ["Finding", "Report", "Verdict", "compare"]
