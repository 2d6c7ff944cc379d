"""Carries weights from one side of a comparison to the other."""

from typing import Literal

from flaxstab.parity._program import Program
from flaxstab.parity._torch_side import TorchSide

Weights = Literal["torch", "flax"] | None


def carry(flax: Program, torch_side: TorchSide, weights: Weights) -> tuple[str, ...]:
    """Carries the weights; returns the names of tensors that Flax does without."""
    if weights == "torch":
        needless = flax.load(torch_side.tensors(), torch_side.buffer_names())
        if flax.tensors():  # back again: Flax may round them, or keep one bias for torch's two
            torch_side.load(flax.tensors())
        return needless
    ours = flax.tensors()
    if weights == "flax":
        torch_side.load(ours)
    return tuple(name for name in torch_side.tensors() if name not in ours)
