"""What small batches do to batch normalisation, and what helps.

Document 2, sections D and H-2: batch, ghost batch, group and layer normalisation at batch 2 to 64,
and why gradient accumulation does not help batch normalisation.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from _cli import Parser, add_output, add_seed, leave, make_folder, whole
from _data import Cifar10, load_small
from _jax_side import JaxRun
from _output import save_figure
from _plan import Plan
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flaxstab import functional, models

mpl.use("Agg")
from matplotlib import pyplot as plt

NORMS = {"batch": "BN", "ghost": "Ghost BN (4)", "group": "GN", "layer": "LN"}
BATCHES = (2, 4, 16, 64)
SIZES = {"widths": (16, 32, 32), "groups": 4}  # groups: of GN, and samples per chunk of Ghost BN
COMPANIES = 50


def build(norm: str, drop: float = 0.0) -> models.StableCNN:
    """Returns a small network with the given norm."""
    return models.StableCNN(norm, "relu", drop=drop, rngs=nnx.Rngs(0), **SIZES)


def companion_noise(norm: str, batch: int, images: np.ndarray) -> float:
    """Returns how much one image's logits depend on the images that share its batch.

    The standard deviation of the first image's logits over random batches, divided by that of
    logits over images: 0 if a sample is normalised by itself.
    """
    graph, state = nnx.split(build(norm))

    @jax.jit
    def logits(x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state, copy=True)(x)

    rng, seen = np.random.default_rng(0), []
    for _ in range(COMPANIES):
        others = rng.choice(np.arange(1, len(images)), batch - 1, replace=False)
        seen.append(np.asarray(logits(jnp.asarray(images[[0, *others]]))[0]))
    spread = np.std(np.asarray(logits(jnp.asarray(images[:64]))), axis=0).mean()
    return float(np.std(seen, axis=0).mean() / spread)


def gradients(norm: str, images: np.ndarray, labels: np.ndarray, chunk: int) -> np.ndarray:
    """Returns the mean loss's gradient, accumulated over chunks of the batch, as one vector."""
    graph, params, rest = nnx.split(build(norm), nnx.Param, ...)

    @jax.jit
    def gradient(params: nnx.State, x: jax.Array, y: jax.Array) -> nnx.State:
        def loss(params: nnx.State) -> jax.Array:
            return functional.cross_entropy(nnx.merge(graph, params, rest, copy=True)(x), y)

        return jax.grad(loss)(params)

    parts = [
        gradient(params, jnp.asarray(images[i : i + chunk]), jnp.asarray(labels[i : i + chunk]))
        for i in range(0, len(images), chunk)
    ]
    mean = jax.tree.map(lambda *g: sum(g) / len(parts), *parts)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(mean)])


def accumulation_gap(norm: str, data: Cifar10) -> tuple[float, float]:
    """Returns how far 16 accumulated gradients of 4 images are from one of 64.

    First against the same network on the whole batch, then against Ghost BN with chunks of 4 on
    the whole batch; both relative to the norm of the gradient.
    """
    images, labels = data.train_images[:64], data.train_labels[:64]
    accumulated = gradients(norm, images, labels, 4)
    whole, ghost = (gradients(kind, images, labels, 64) for kind in (norm, "ghost"))
    return tuple(
        float(np.linalg.norm(accumulated - other) / np.linalg.norm(other))
        for other in (whole, ghost)
    )


def accuracy(norm: str, batch: int, data: Cifar10, samples: int, seed: int) -> float:
    """Returns the test accuracy after one pass over some training samples."""
    plan = Plan(variant=NORMS[norm], norm=norm, act="relu", batch_size=batch, epochs=1,
                train_size=samples, seed=seed, learning_rate=1e-3, **SIZES)  # fmt: skip
    run = JaxRun(plan, data)
    for order in plan.orders():
        run.start_epoch(order)
        for _ in range(plan.steps_per_epoch):
            run.step()
    return run.evaluate().accuracy


def table_of(title: str, values: dict[str, list[float]], form: str) -> Table:
    """Returns a table with one row per norm and one column per batch size."""
    table = Table(title=title)
    table.add_column("norm")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for norm, row in values.items():
        table.add_row(NORMS[norm], *(format(value, form) for value in row))
    return table


def draw(noise: dict[str, list[float]], accuracies: dict[str, list[float]]) -> "plt.Figure":
    """Draws both measurements against the batch size."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, values in zip(axes, (noise, accuracies), strict=True):
        for norm, row in values.items():
            axis.plot(BATCHES, row, marker="o", label=NORMS[norm])
        axis.set_xscale("log", base=2)
        axis.set_xticks(BATCHES, [str(b) for b in BATCHES])
        axis.set_xlabel("batch size")
        axis.grid(alpha=0.3)
    axes[0].set_title("how much an image's logits depend on its batch")
    axes[1].set_title("test accuracy after one pass\n(a larger batch takes fewer steps)")
    axes[0].legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = Parser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--samples",
        type=whole(max(BATCHES), 5000),
        default=1500,
        metavar="N",
        help="training images per run, 64 to 5000 (default: 1500)",
    )
    add_output(parser, "runs/small_batch")
    add_seed(parser)
    options = parser.parse_args(arguments)
    folder = make_folder(parser, options.output)
    console, data = Console(), load_small().normalized(np.dtype("float32"))

    noise = {n: [companion_noise(n, b, data.train_images) for b in BATCHES] for n in NORMS}
    console.print(table_of("How much an image's logits depend on its batch", noise, ".3f"))

    table = Table(title="16 accumulated gradients of 4 images, relative difference to…")
    for column in ("norm", "…one gradient of 64 images", "…Ghost BN (4) on 64 images"):
        table.add_column(column, justify="left" if column == "norm" else "right")
    for norm in ("batch", "group", "layer"):
        to_one, to_ghost = accumulation_gap(norm, data)
        table.add_row(NORMS[norm], f"{to_one:.1e}", f"{to_ghost:.1e}" if norm == "batch" else "-")
    console.print(table)
    console.print("Accumulating does not enlarge the batch that BN sees: it is Ghost BN.\n")

    # A batch that is one chunk makes Ghost BN plain BN.
    pairs = [(n, b) for n in NORMS for b in BATCHES if n != "ghost" or b > SIZES["groups"]]
    results = {
        pair: accuracy(*pair, data, options.samples, options.seed)
        for pair in track(pairs, "training", console=console)
    }
    accuracies = {
        norm: [results.get((norm, batch), results["batch", batch]) for batch in BATCHES]
        for norm in NORMS
    }
    title = f"Test accuracy after one pass over {options.samples} images"
    console.print(table_of(title, accuracies, ".1%"))

    path = folder / "small_batch.png"
    save_figure(path, draw(noise, accuracies))
    console.print(f"Written: [bold]{path}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    leave(main())
