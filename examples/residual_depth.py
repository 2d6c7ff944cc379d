"""How residual branches change the spread of activations with depth, and what stops it.

Each block adds a branch of variance about 1. Where branches start at zero (zero_last_gamma), the
variance stays what it was; where they are scaled by 0.1, it grows a hundred times more slowly.
Document 2, section B-6; P. Goyal et al., arXiv:1706.02677; S. De, S. L. Smith, arXiv:2002.10444.
"""

from collections.abc import Sequence
from functools import partial

import jax
import matplotlib as mpl
import numpy as np
from _cli import Parser, add_output, leave, make_folder, whole
from _output import save_figure
from flax import nnx
from rich.console import Console
from rich.table import Table

from flaxstab import blocks, norms, surgery

mpl.use("Agg")
from matplotlib import pyplot as plt

CHANNELS, SIZE, IMAGES = 32, 8, 16
KINDS = {
    "pre-activation": partial(blocks.PreActResBlock, CHANNELS, CHANNELS, norm=norms.BatchNorm),
    "post-activation": partial(blocks.BasicBlock, CHANNELS, CHANNELS),
}
STARTS = {"plain": "tab:red", "branch times 0.1": "tab:orange", "zero_last_gamma": "tab:green"}
# He's law keeps the second moment 1 of normalised values behind a ReLU, but for the zeros that the
# padding brings into the windows at the border.
ADDED = ((3 * SIZE - 2) / (3 * SIZE)) ** 2

_step = nnx.jit(lambda block, x: block(x))


def variances(kind: str, start: str, depth: int, seed: int) -> np.ndarray:
    """Returns the variance of a random input, and behind each of ``depth`` blocks in a row."""
    rngs = nnx.Rngs(seed)
    residual = blocks.Residual(scale=0.1 if start == "branch times 0.1" else 1.0)
    x = jax.random.normal(jax.random.key(seed), (IMAGES, SIZE, SIZE, CHANNELS))
    found = [float(x.var())]
    for _ in range(depth):
        block = KINDS[kind](residual=residual, rngs=rngs)
        if start == "zero_last_gamma":
            surgery.zero_last_gamma(block)
        x = _step(block, x)
        found.append(float(x.var()))
    return np.array(found)


def expected(start: str, depth: int) -> np.ndarray:
    """Returns what the variance behind each pre-activation block should be."""
    added = {"plain": ADDED, "branch times 0.1": 0.01 * ADDED, "zero_last_gamma": 0.0}[start]
    return 1 + added * np.arange(depth + 1)


Measured = dict[str, dict[str, np.ndarray]]


def draw(measured: Measured) -> "plt.Figure":
    """Draws the variance against depth for each kind of block."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axis, (kind, starts) in zip(axes, measured.items(), strict=True):
        for start, runs in starts.items():
            depth = np.arange(runs.shape[1])
            axis.plot(depth, runs.mean(0), color=STARTS[start], label=start)
            axis.fill_between(depth, runs.min(0), runs.max(0), color=STARTS[start], alpha=0.25)
            if kind == "pre-activation":
                line = expected(start, len(depth) - 1)
                axis.plot(depth, line, color="black", lw=0.8, ls=":",
                          label="expected" if start == "plain" else None)  # fmt: skip
        axis.set(yscale="log", xlabel="blocks", title=kind)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("variance of the activations")
    axes[0].legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = Parser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--blocks", type=whole(1, 1000), default=48, metavar="N",
                        help="blocks in a row (default: 48)")  # fmt: skip
    parser.add_argument(
        "--seeds", type=whole(1, 1000), default=3, metavar="N", help="networks (default: 3)"
    )
    add_output(parser, "runs/residual_depth")
    options = parser.parse_args(arguments)
    folder = make_folder(parser, options.output)
    measured: Measured = {
        kind: {
            start: np.array(
                [variances(kind, start, options.blocks, s) for s in range(options.seeds)]
            )
            for start in STARTS
        }
        for kind in KINDS
    }
    console = Console()
    table = Table(title=f"Variance of the activations behind {options.blocks} blocks")
    for title in ("block", "start", "first", "last", "expected"):
        table.add_column(title)
    for kind, starts in measured.items():
        for start, runs in starts.items():
            last = expected(start, options.blocks)[-1]
            said = f"{last:.3f}" if kind == "pre-activation" else ""
            ends = (f"{runs[:, place].mean():.3f}" for place in (1, -1))
            table.add_row(kind, start, *ends, said)
    console.print(table)
    path = folder / "variance_along_depth.png"
    save_figure(path, draw(measured))
    console.print(f"Written: [bold]{path}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    leave(main())
