"""What a run leaves behind: a log that survives an interruption, a summary, tables and figures."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from _plan import Evaluation, Gap, Plan, Step

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"bn-relu": "tab:blue", "gn-gelu": "tab:orange", "ln-gelu": "tab:green"}


@dataclass
class Result:
    """What one training run has reported so far.

    Attributes:
      plan: the run's settings.
      steps: one report per step.
      evaluations: (steps taken, report) after each epoch.
      gaps: how far JAX and PyTorch were apart after each step, if both ran.
      twin: PyTorch's last evaluation, if both ran.
      devices: how many devices the batches were spread over.
      seconds: time spent training, compilation included.
    """

    plan: Plan
    steps: list[Step] = field(default_factory=list)
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    gaps: Sequence[Gap] = ()
    twin: Evaluation | None = None
    devices: int = 1
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return len(self.steps) == self.plan.total_steps

    def summary(self) -> dict[str, object]:
        """Returns the run's outcome as plain data."""
        last = self.evaluations[-1][1] if self.evaluations else None
        outcome: dict[str, object] = {
            **asdict(self.plan),
            "steps_taken": len(self.steps),
            "finished": self.finished,
            "devices": self.devices,
            "test_accuracy": last.accuracy if last else None,
            "test_loss": last.loss if last else None,
            "seconds": round(self.seconds, 2),
        }
        if self.gaps:
            outcome["largest_gap"] = largest_gaps(self.gaps)
        if self.twin:
            outcome["torch_test_accuracy"] = self.twin.accuracy
        return outcome


def largest_gaps(gaps: Sequence[Gap]) -> dict[str, float]:
    """Returns the largest difference of each kind over all steps."""
    kinds = ("loss", "parameters", "statistics", "moments", "twin")
    return {kind: max(getattr(gap, kind) for gap in gaps) for kind in kinds}


class Folder:
    """An output folder that is new, so that nothing in it is lost.

    Args:
      path: the folder; it is created.

    Raises:
      ValueError: if it exists and is not an empty folder.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"--output must be new or an empty folder, got {path}")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def log(self, records: Sequence[Mapping[str, object]]) -> None:
        """Appends records to ``metrics.jsonl``, one line each."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def write_json(self, name: str, content: object) -> None:
        """Writes a JSON file whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, self.path / name)


def save_figure(path: Path, figure: "plt.Figure") -> None:
    """Writes a figure whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    os.replace(partial, path)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Returns a running mean over a 40th of the values, aligned with them."""
    width = max(1, len(values) // 40)
    padded = np.pad(np.asarray(values, float), (width - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(width) / width, "valid")


def draw_curves(results: Sequence[Result]) -> "plt.Figure":
    """Draws loss, test accuracy, gradient norm and learning rate: one row per batch size."""
    sizes = sorted({r.plan.batch_size for r in results}, reverse=True)
    titles = ("training loss", "test accuracy", "gradient norm before clipping", "learning rate")
    figure, grid = plt.subplots(
        len(sizes), 4, figsize=(17, 3.6 * len(sizes)), squeeze=False, layout="constrained"
    )
    for row, size in zip(grid, sizes, strict=True):
        for result in (r for r in results if r.plan.batch_size == size and r.steps):
            _draw_run(row, result)
        for axis, title in zip(row, titles, strict=True):
            axis.set(title=f"{title}, batch {size}", xlabel="step", ymargin=0.08)
            axis.grid(alpha=0.3)
        row[0].legend()
        row[1].axhline(0.1, color="black", lw=0.8, ls=":", label="chance")
        row[1].legend()
        row[2].set_yscale("log")
        row[2].axhline(1.0, color="black", lw=0.8, ls=":", label="clipped to")
        row[2].legend()
    return figure


def _draw_run(row: Sequence["plt.Axes"], result: Result) -> None:
    style = {"color": COLORS[result.plan.variant], "label": result.plan.variant}
    steps = np.arange(1, len(result.steps) + 1)
    row[0].plot(steps, [s.loss for s in result.steps], color=style["color"], alpha=0.15, lw=0.6)
    row[0].plot(steps, smoothed([s.loss for s in result.steps]), **style)
    at = [step for step, _ in result.evaluations]
    accuracies = [e.accuracy for _, e in result.evaluations]
    row[1].plot(at, accuracies, marker="o", ms=3, color=style["color"])
    plain = {"color": style["color"]}
    row[2].plot(steps, smoothed([s.gradient_norm for s in result.steps]), **plain)
    row[3].plot(steps, [s.learning_rate for s in result.steps], **plain)


def draw_agreement(results: Sequence[Result]) -> "plt.Figure":
    """Draws, step by step, how far JAX and PyTorch are apart, and JAX from its own copy."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(5.5 * len(results), 4), squeeze=False, layout="constrained",
        sharey=True,
    )  # fmt: skip
    kinds = {
        "loss": ("loss", {"color": "tab:blue"}),
        "parameters": ("weights", {"color": "tab:orange"}),
        "statistics": ("running statistics", {"color": "tab:green"}),
        "moments": ("optimizer state", {"color": "tab:red"}),
        "twin": ("weights of JAX, started 1 eps away", {"color": "black", "ls": "--"}),
    }
    for axis, result in zip(axes[0], results, strict=True):
        steps = np.arange(1, len(result.gaps) + 1)
        for kind, (label, style) in kinds.items():
            values = np.array([getattr(gap, kind) for gap in result.gaps])
            if values.any():
                shown = steps[values > 0], values[values > 0]  # 0 has no place on a log scale
                axis.plot(*shown, label=label, lw=1, marker=".", ms=3, **style)
        axis.set(title=f"{result.plan.name}, {result.plan.dtype}", xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("largest relative difference, JAX to PyTorch")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure
