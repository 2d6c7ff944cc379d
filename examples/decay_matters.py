"""What weight decay does to norm scales: L2 in Adam's gradient, AdamW on everything, AdamW by mask.

Document 2, section F, on the mini project's network at a sixth of its size and two strengths of
decay. On 2 CPU cores it takes 2 minutes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import matplotlib as mpl
import numpy as np
import optax
from _cli import Parser, add_output, add_seed, leave, make_folder, whole
from _data import Cifar10, load_small
from _jax_side import JaxRun, Update, masked_adamw
from _output import save_figure
from _plan import Plan
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flaxstab import optim

mpl.use("Agg")
from matplotlib import pyplot as plt

DECAYS = (0.05, 0.2)  # the document's, and four times as much
PEAK = 3e-3
SIZES = {"widths": (16, 32, 32), "groups": 4}
MEASURED_EVERY = 10  # steps
COLORS = {"L2": "tab:red", "everything": "tab:orange", "weights": "tab:blue"}
TITLES = {"L2": "Adam with L2", "everything": "AdamW, no mask", "weights": "AdamW, mask"}


def adam_with_l2(_: nnx.Module, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """Returns ``torch.optim.Adam(weight_decay=decay)``: the decay passes through the moments."""
    return optim.adam(rate, weight_decay=decay)


def adamw_on_everything(
    _: nnx.Module, rate: optax.Schedule, decay: float
) -> optax.GradientTransformation:
    """Returns AdamW without a mask."""
    return optim.adamw(rate, weight_decay=decay)


UPDATES: dict[str, Update] = {
    "L2": adam_with_l2,
    "everything": adamw_on_everything,
    "weights": masked_adamw,
}


class Course(NamedTuple):
    """What one run shows.

    Attributes:
      steps: the steps after which sizes were measured.
      scales: mean, smallest and largest absolute norm scale there, relative to the start (1).
      weights: norm of all weights there, relative to the start.
      accuracies: test accuracy after each epoch.
    """

    steps: np.ndarray
    scales: np.ndarray
    weights: np.ndarray
    accuracies: list[float]


def sizes(model: nnx.Module) -> tuple[np.ndarray, float]:
    """Returns the absolute values of all norm scales, and the norm of all weights."""
    mask, scales, weights = optim.decay_mask(model), [], []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...], np.float64)
        if mask.roles[tuple(map(str, path))].decays:
            weights.append(np.square(value).sum())
        elif path[-1] == "scale":
            scales.append(np.abs(value))
    return np.concatenate(scales), float(np.sqrt(sum(weights)))


def course(plan: Plan, update: Update, data: Cifar10, advance: Callable[[], None]) -> Course:
    """Trains, and measures on the way."""
    run = JaxRun(plan, data, update)
    _, start = sizes(run.model)
    steps, scales, weights, accuracies = [], [], [], []

    def measure(step: int) -> None:
        now, norm = sizes(run.model)
        steps.append(step)
        scales.append((now.mean(), now.min(), now.max()))
        weights.append(norm / start)

    measure(0)
    for epoch, order in enumerate(plan.orders()):
        run.start_epoch(order)
        for step in range(1, plan.steps_per_epoch + 1):
            run.step()
            if step % MEASURED_EVERY == 0 or step == plan.steps_per_epoch:
                measure(epoch * plan.steps_per_epoch + step)
        accuracies.append(run.evaluate().accuracy)
        advance()
    return Course(np.array(steps), np.array(scales), np.array(weights), accuracies)


def decay_alone(plan: Plan) -> np.ndarray:
    """Returns what AdamW's decay leaves of a parameter that has no gradient, after each step."""
    rate = optim.warmup_cosine(plan.learning_rate, plan.warmup_steps, plan.total_steps)
    rates = np.asarray(jax.jit(rate)(np.arange(plan.total_steps)), np.float64)
    return np.cumprod(1 - rates * plan.weight_decay)


def table_of(courses: dict[tuple[float, str], Course]) -> Table:
    """Returns a table with one row per run."""
    table = Table(
        title="At the end of training: sizes relative to the start's, accuracy on the test set"
    )
    for column in ("decay", "optimizer"):
        table.add_column(column)
    for column in ("norm scales", "their range", "weights", "accuracy"):
        table.add_column(column, justify="right")
    for (decay, name), run in courses.items():
        mean, low, high = run.scales[-1]
        table.add_row(str(decay), TITLES[name], f"{mean:.3f}", f"{low:.2f} to {high:.2f}",
                      f"{run.weights[-1]:.3f}", f"{run.accuracies[-1]:.1%}")  # fmt: skip
    return table


def told(plans: dict[float, Plan], courses: dict[tuple[float, str], Course]) -> list[str]:
    """Returns what to read in the table."""
    lines = ["L2 takes about the same of every scale, however strong: Adam divides by its size."]
    for decay, plan in plans.items():
        bare, masked = (courses[decay, name].scales[-1, 0] for name in ("everything", "weights"))
        left = decay_alone(plan)[-1]
        lines.append(
            f"AdamW, decay {decay}: without the mask the scales are {bare / masked:.3f} of those "
            f"with it; the decay alone leaves {left:.3f}."
        )
    return lines


def draw(plans: dict[float, Plan], courses: dict[tuple[float, str], Course]) -> "plt.Figure":
    """Draws norm scales, weights and test accuracy: one row per strength of decay."""
    figure, grid = plt.subplots(
        len(plans), 3, figsize=(14, 3.8 * len(plans)), squeeze=False, layout="constrained"
    )
    for row, (decay, plan) in zip(grid, plans.items(), strict=True):
        for name, color in COLORS.items():
            run, style = courses[decay, name], {"color": color, "label": TITLES[name]}
            row[0].plot(run.steps, run.scales[:, 0], **style)
            row[0].fill_between(run.steps, *run.scales[:, 1:].T, color=color, alpha=0.15, lw=0)
            row[1].plot(run.steps, run.weights, **style)
            ends = plan.steps_per_epoch * np.arange(1, plan.epochs + 1)
            row[2].plot(ends, run.accuracies, marker="o", ms=3, **style)
        steps = np.arange(1, plan.total_steps + 1)
        for axis in row[:2]:
            axis.plot(steps, decay_alone(plan), "k:", lw=1, label="decay alone")
        titles = ("norm scales: mean and range", "norm of all weights", "test accuracy")
        for axis, title in zip(row, titles, strict=True):
            axis.set(title=f"{title}, decay {decay}", xlabel="step")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    grid[0][1].legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = Parser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--samples", type=whole(32, 5000), default=3000, metavar="N",
                        help="training images, 32 to 5000 (default: 3000)")  # fmt: skip
    parser.add_argument("--epochs", type=whole(1), default=6, metavar="N", help="default: 6")
    parser.add_argument("--norm", choices=("batch", "group", "layer"), default="batch")
    add_seed(parser)
    add_output(parser, "runs/decay_matters")
    options = parser.parse_args(arguments)
    folder = make_folder(parser, options.output)
    console, data = Console(), load_small().normalized(np.dtype("float32"))
    plans = {
        decay: Plan(variant=options.norm, norm=options.norm, act="relu", batch_size=32,
                    epochs=options.epochs, train_size=options.samples, seed=options.seed,
                    learning_rate=PEAK, weight_decay=decay, **SIZES)
        for decay in DECAYS
    }  # fmt: skip
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(plans) * len(UPDATES) * options.epochs)
        courses = {
            (decay, name): course(plan, update, data, lambda: progress.advance(task))
            for decay, plan in plans.items()
            for name, update in UPDATES.items()
        }
    console.print(table_of(courses))
    console.print(*told(plans, courses), sep="\n", highlight=False)
    path = folder / "decay_matters.png"
    save_figure(path, draw(plans, courses))
    console.print(f"Written: [bold]{path}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    leave(main())
