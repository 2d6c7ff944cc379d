"""False alarms: sound pairs compared on many inputs, of any mean."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import models, norms
from flaxstab.parity._inputs import is_float
from flaxstab.parity._models import Pair
from flaxstab.parity._selftest._cases import layers, normal
from flaxstab.parity._selftest._cases_dropout import dropouts
from flaxstab.parity._selftest._plant import Build, Sides

if TYPE_CHECKING:
    import torch

OFFSETS = (0.0, 10.0, 100.0, 1000.0)
DTYPES = (np.float32, jnp.bfloat16)


class Sweep(NamedTuple):
    """What a sound pair gave over many inputs.

    Attributes:
      name: the case.
      comparisons: how many there were: seeds times offsets, each in float64 and both precisions.
      alarms: those that did not agree, in words.
      largest: the largest error over its bound.
      quantity: where that was.
    """

    name: str
    comparisons: int
    alarms: tuple[str, ...]
    largest: float
    quantity: str

    def __str__(self) -> str:
        words = [
            f"{self.name:32s} {self.comparisons:6d} comparisons, {len(self.alarms)} alarms, "
            f"largest error {self.largest:.2g} of its bound ({self.quantity})"
        ]
        return "\n  ".join([*words, *self.alarms])


def sweep(cases: Mapping[str, Callable[[], Sides]], seeds: int) -> Iterator[Sweep]:
    """Compares each sound pair on inputs from many seeds, at means 0, 10, 100 and 1000.

    Args:
      cases: by name.
      seeds: how many.

    Yields:
      One result for each case.
    """
    for name, build in cases.items():
        sides = build()
        pair = Pair(sides.ours, sides.theirs, sides.inputs, layout=sides.layout)
        alarms, worst = [], (0.0, "")
        for seed in range(seeds):
            for offset in OFFSETS:
                inputs = redrawn(sides.inputs, seed, offset)
                report = pair.judge(inputs, dtypes=DTYPES, seed=seed)
                # An alarm on either side is one: both are sound.
                alarms += [
                    f"seed {seed}, mean {offset:g}: {f.verdict} {f.name} in {f.dtype}, "
                    f"{f.excess:.3g} of the bound"
                    for f in report.findings
                    if f.side or not f.passed
                ]
                found = max(report.findings, key=lambda f: f.excess)
                worst = max(worst, (found.excess, f"{found.name} in {found.dtype}"))
        yield Sweep(name, seeds * len(OFFSETS), tuple(alarms), *worst)


def sound_pairs() -> dict[str, Callable[[], Sides]]:
    """Returns what builds every shipped layer beside PyTorch, and whole networks of them."""

    def ghost() -> "torch.nn.Module":
        from torch_ref.norms import GhostBatchNorm

        return GhostBatchNorm(4, 4)

    def frozen() -> "torch.nn.Module":

        from torch_ref.norms import FrozenBatchNorm

        class Kept(FrozenBatchNorm):  # in the input's dtype
            def forward(self, x: "torch.Tensor") -> "torch.Tensor":
                return super().forward(x).to(x.dtype)

        return Kept(4)

    def norm_layer(
        ours: Callable[[], nnx.Module], theirs: "Callable[[], torch.nn.Module]"
    ) -> Callable[[], Sides]:
        return Build(ours, theirs, (normal(8, 3, 3, 4),), layout="image")

    def network(norm: str, act: Literal["relu", "gelu"]) -> Callable[[], Sides]:
        widths = 8, 16

        def theirs() -> "torch.nn.Module":
            from torch_ref.models import StableCNN

            return StableCNN(norm, act, widths=widths, groups=4, image_size=8)

        def ours() -> nnx.Module:
            rngs = nnx.Rngs(0)
            return models.StableCNN(norm, act, widths=widths, groups=4, image_size=8, rngs=rngs)

        return Build(ours, theirs, (normal(4, 8, 8, 3),), layout="image")

    # Without two whose outputs have their parameters' dtype, which the harness keeps in float32.
    without = ("embedding", "LSTM, masks given")
    shipped = {**layers(), **dropouts()}
    return {
        **{name: build for name, build in shipped.items() if name not in without},
        "ghost batch norm": norm_layer(lambda: norms.GhostBatchNorm(4, 4), ghost),
        "frozen batch norm": norm_layer(lambda: norms.FrozenBatchNorm(4), frozen),
        "network of BN and ReLU": network("batch", "relu"),
        "network of GN and GELU": network("group", "gelu"),
        "network of LN and GELU": network("layer", "gelu"),
    }


def redrawn(inputs: tuple[np.ndarray, ...], seed: int, offset: float) -> tuple[np.ndarray, ...]:
    """Returns normal numbers of deviation 1 and some mean in place of floating-point inputs."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(offset, 1.0, a.shape) if is_float(a) else a for a in inputs)
