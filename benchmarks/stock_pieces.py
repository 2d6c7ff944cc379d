"""What the harness says of stock flax.nnx and optax pieces beside PyTorch's: writes a docs page.

Run it with the versions that you want to know about: ``python benchmarks/stock_pieces.py`` writes
``docs/stock_pieces.md``. ``parity_tests/test_stock_pieces.py`` holds the page to what it says.
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch import Tensor

from flaxstab import parity

PAGE = Path(__file__).parents[1] / "docs" / "stock_pieces.md"
RNGS = nnx.Rngs(0)
torch.manual_seed(0)  # the twins' weights
PACKAGES = ("jax", "flax", "optax", "torch")


def normal(*shape: int, offset: float = 1.0, scale: float = 2.0) -> np.ndarray:
    """Returns normal numbers of a fixed seed."""
    return np.random.default_rng(0).normal(offset, scale, shape)


IMAGES = normal(8, 6, 6, 8)
ROWS = normal(16, 64)
NEAR = normal(16, 1, offset=100.3, scale=0.1)
PARAMETERS = (normal(4, 3), normal(5))
NO_MASK = np.zeros((6, 6))
CAUSAL = np.triu(np.full((6, 6), -np.inf), 1)
Step = Callable[[list[torch.nn.Parameter]], object]


class Piece(NamedTuple):
    """A stock piece and what it is compared with.

    Attributes:
      name: as a user would write it.
      twin: the same for PyTorch.
      compare: runs the comparison.
      advice: what closes the gap.
    """

    name: str
    twin: str
    compare: Callable[[], parity.Report]
    advice: str


class Grouped(nnx.Module):
    """``nnx.GroupNorm`` with two batch axes."""

    def __init__(self) -> None:
        self.norm = nnx.GroupNorm(
            8, num_groups=2, epsilon=1e-5, reduction_axes=(-3, -2, -1), rngs=RNGS
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (A, B, H, W, C) per image and group."""
        return self.norm(x)


class TorchGrouped(torch.nn.Module):
    """The same of images in a batch of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (A, B, H, W, C) per image and group."""
        images = x.movedim(-1, 2)  # (A, B, H, W, C) -> (A, B, C, H, W)
        return self.norm(images.flatten(0, 1)).reshape(images.shape).movedim(2, -1)


class Attention(nnx.Module):
    """``nnx.MultiHeadAttention`` with a mask of torch's kind."""

    def __init__(self, mask: np.ndarray) -> None:
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=RNGS)
        self.mask = nnx.static(tuple(map(tuple, mask.tolist())))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends from (N, L, D) to itself."""
        return self.attention(x, mask=jnp.asarray(self.mask)[None, None])


class TorchAttention(torch.nn.Module):
    """``torch.nn.MultiheadAttention`` with the same mask."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """Attends from (N, L, D) to itself."""
        mask = torch.tensor(self.mask)
        mask = mask if mask.dtype == torch.bool else mask.to(x.dtype)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def evaluated(x: jax.Array) -> jax.Array:
    """Returns what stock batch normalisation in bfloat16 makes of its running statistics."""
    norm = nnx.BatchNorm(1, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
    norm.mean = nnx.BatchStat(jnp.array([100.3], x.dtype))
    norm.var = nnx.BatchStat(jnp.array([0.01], x.dtype))
    return norm(x).astype(x.dtype)


def torch_evaluated(x: Tensor) -> Tensor:
    """Returns the same from PyTorch, with the same eps."""
    mean, var = torch.tensor([100.3]).to(x.dtype), torch.tensor([0.01]).to(x.dtype)
    return torch.nn.functional.batch_norm(x, mean, var, eps=1e-5)


def layer(
    ours: nnx.Module, theirs: torch.nn.Module, x: np.ndarray, dtype: object = np.float32
) -> Callable[[], parity.Report]:
    """Returns the comparison of two layers."""
    layout = "image" if x.ndim == 4 else None
    return lambda: parity.compare(ours, theirs, x, layout=layout, dtypes=(dtype,))


def optimizer(
    tx: optax.GradientTransformation, step: Step, dtype: object = np.float32
) -> Callable[[], parity.Report]:
    """Returns the comparison of two optimizers."""
    return lambda: parity.compare(tx, step, *PARAMETERS, dtypes=(dtype,))


def batch_norm(**options: object) -> nnx.BatchNorm:
    """Returns stock batch normalisation."""
    return nnx.BatchNorm(8, rngs=RNGS, **options)


def layer_norm(**options: object) -> nnx.LayerNorm:
    """Returns stock layer normalisation."""
    return nnx.LayerNorm(64, rngs=RNGS, **options)


PIECES = (
    Piece(
        "nnx.BatchNorm(8)", "BatchNorm2d(8)", layer(batch_norm(), torch.nn.BatchNorm2d(8), IMAGES),
        "momentum 0.99 weighs the old value (torch: 0.1 the new), and the variance is biased",
    ),
    Piece(
        "nnx.BatchNorm(8, momentum=0.9, epsilon=1e-5)", "BatchNorm2d(8)",
        layer(batch_norm(momentum=0.9, epsilon=1e-5), torch.nn.BatchNorm2d(8), IMAGES),
        "no argument makes the running variance unbiased: `flaxstab.norms.BatchNorm`",
    ),
    Piece(
        "nnx.BatchNorm(1, dtype=bfloat16) in evaluation, mean 100.3, variance 0.01",
        "F.batch_norm, the same statistics",
        lambda: parity.compare(evaluated, torch_evaluated, NEAR, dtypes=()),
        "it rounds the running statistics to bfloat16 before it subtracts: leave dtype=None",
    ),
    Piece(
        "nnx.LayerNorm(64)", "LayerNorm(64)", layer(layer_norm(), torch.nn.LayerNorm(64), ROWS),
        "epsilon is 1e-6; pass epsilon=1e-5",
    ),
    Piece(
        "nnx.LayerNorm(64, epsilon=1e-5), inputs of mean 1000", "LayerNorm(64)",
        layer(layer_norm(epsilon=1e-5), torch.nn.LayerNorm(64), normal(16, 64, offset=1e3)),
        "pass use_fast_variance=False",
    ),
    Piece(
        "nnx.LayerNorm(64, epsilon=1e-5, use_fast_variance=False), mean 1000", "LayerNorm(64)",
        layer(
            layer_norm(epsilon=1e-5, use_fast_variance=False), torch.nn.LayerNorm(64),
            normal(16, 64, offset=1e3),
        ),
        "",
    ),
    Piece(
        "nnx.GroupNorm with two batch axes", "GroupNorm(2, 8)",
        layer(Grouped(), TorchGrouped(), normal(2, 3, 4, 4, 8)),
        "flatten the batch axes first (an upstream bug: docs/upstream.md)",
    ),
    Piece(
        "nnx.MultiHeadAttention, no mask", "MultiheadAttention",
        layer(Attention(NO_MASK == 0), TorchAttention(NO_MASK), normal(2, 6, 16)),
        "its softmax is in float32 whatever the inputs: pass an attention_fn of your own",
    ),
    Piece(
        "nnx.Embed(9, 8)", "Embedding(9, 8)",
        lambda: parity.compare(
            nnx.Embed(9, 8, rngs=RNGS), torch.nn.Embedding(9, 8), np.arange(8).reshape(2, 4)
        ),
        "it is made with dtype=float32: float64 parameters come out as float32",
    ),
    Piece(
        "nnx.MultiHeadAttention, float mask", "MultiheadAttention, the same mask",
        layer(Attention(CAUSAL), TorchAttention(CAUSAL), normal(2, 6, 16)),
        "the mask is read as booleans, of the opposite sense (True attends): pass mask == 0",
    ),
    Piece(
        "optax.adamw(1e-3)", "AdamW(lr=1e-3)",
        optimizer(optax.adamw(1e-3), lambda ps: torch.optim.AdamW(ps, lr=1e-3)),
        "weight_decay is 1e-4 (torch: 1e-2)",
    ),
    Piece(
        "optax.adamw(1e-3, weight_decay=1e-2)", "AdamW(lr=1e-3)",
        optimizer(
            optax.adamw(1e-3, weight_decay=1e-2), lambda ps: torch.optim.AdamW(ps, lr=1e-3)
        ),
        "",
    ),
    Piece(
        "optax.amsgrad(1e-3)", "Adam(lr=1e-3, amsgrad=True)",
        optimizer(
            optax.amsgrad(1e-3), lambda ps: torch.optim.Adam(ps, lr=1e-3, amsgrad=True)
        ),
        "the maximum is of the corrected moment: `flaxstab.optim.adamw(amsgrad=True)`",
    ),
    Piece(
        "optax.clip_by_global_norm(1.0), float16", "clip_grad_norm_(1.0)",
        optimizer(
            optax.clip_by_global_norm(1.0),
            lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1.0),
            jnp.float16,
        ),
        "squares overflow, and torch adds 1e-6 to the norm: `flaxstab.optim.clip_grad_norm`",
    ),
)  # fmt: skip


def _where(grave: list[parity.Finding]) -> str:
    """Returns the quantities that differ in float64 or, if none do, the dtypes that are inexact.

    Which of a poor algorithm's quantities are just over the bound depends on the machine.
    """
    meant = list(dict.fromkeys(f"{f.name} (float64)" for f in grave if f.dtype == "float64"))
    if not meant:
        return ", ".join(dict.fromkeys(f"numerics in {f.dtype}" for f in grave))
    return ", ".join(meant[:3]) + (f" and {len(meant) - 3} more" if len(meant) > 3 else "")


def row(piece: Piece, report: parity.Report) -> str:
    """Returns a piece's line of the table."""
    grave = [f for f in report.findings if not f.passed]
    where = _where(grave)
    worst = f"{report.worst.name}: {report.worst.explanation}"
    figure = worst if grave else f"{len(report.findings)} quantities agree"
    cells = (f"`{piece.name}`", f"`{piece.twin}`", report.verdict, where, figure, piece.advice)
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """Returns the page's text."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    rows = "\n".join(row(piece, piece.compare()) for piece in PIECES)
    return f"""# What the harness says of stock pieces

Each line is one call of `flaxstab.parity.compare` with the weights carried over from PyTorch: stock
flax.nnx or optax beside the PyTorch piece of the same name. Made by `benchmarks/stock_pieces.py`
with {versions} on a CPU.

"The magnitude" is what the terms of a quantity add up to without cancelling; "its sensitivity" how
far it moves when the inputs move by their own size. In float64 both sides must agree to 1e-12 of
the magnitude. In lower precisions each side is held to its own float64 result: JAX's error may be
twice PyTorch's plus 2 eps of the sensitivity.

| stock piece | PyTorch | verdict | failing quantities | the worst of them | what closes the gap |
|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Writes the page."""
    text = page()
    new = PAGE.with_suffix(".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(PAGE)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
