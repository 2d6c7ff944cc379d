"""What the character model leaves behind: its log, read again; figure, table and sample."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from _checkpoint import CheckpointError
from _language import Settings
from _output import Folder, plt, smoothed
from rich.table import Table

Records = list[dict[str, float]]


class OldFolder(Folder):
    """The folder of a run that goes on; what it logged after its checkpoint is forgotten.

    Args:
      path: the folder.
      step: the checkpoint's step.

    Attributes:
      records: what was logged up to there.

    Raises:
      CheckpointError: if the log does not hold each step up to there once.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        log = path / "metrics.jsonl"
        self.records = _whole_records(log) if log.exists() else []
        self.records = [record for record in self.records if record.get("step", math.inf) <= step]
        if [r["step"] for r in self.records if "loss" in r] != list(range(1, step + 1)):
            raise CheckpointError(f"{log} must have each step up to the checkpoint's, {step}, once")
        write_text(log, "".join(json.dumps(record) + "\n" for record in self.records))


def write_text(path: Path, content: str) -> None:
    """Writes a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, "utf-8")
    os.replace(partial, path)


def _whole_records(log: Path) -> Records:
    """Reads a log up to a line that is not whole: the last, if the process was killed."""
    records: Records = []
    for line in log.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def draw_curves(records: Records, settings: Settings, bigram: float) -> "plt.Figure":
    """Draws losses, learning rate and gradient norm."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    steps = [r for r in records if "loss" in r]
    at = [r["step"] for r in steps]
    loss = [r["loss"] for r in steps]
    axes[0].plot(at, loss, color="tab:blue", alpha=0.15, lw=0.6)
    axes[0].plot(at, smoothed(loss), color="tab:blue", label="training, dropout on")
    looks = [r for r in records if "validation_loss" in r]
    axes[0].plot([r["step"] for r in looks], [r["validation_loss"] for r in looks],
                 color="tab:orange", marker="o", ms=3, label="validation")  # fmt: skip
    axes[0].axhline(bigram, color="black", lw=0.8, ls=":", label="best of all bigram models")
    axes[1].plot(at, [r["learning_rate"] for r in steps], color="tab:blue")
    axes[2].plot(at, smoothed([r["gradient_norm"] for r in steps]), color="tab:blue")
    axes[2].axhline(settings.max_norm, color="black", lw=0.8, ls=":", label="clipped to")
    axes[2].set_yscale("log")
    titles = ("loss, nats per character", "learning rate", "gradient norm before clipping")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step", ymargin=0.08)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].legend()
    return figure


def outcome_table(losses: Mapping[str, float]) -> Table:
    """Returns the table at the end: each loss in nats, in bits, and as so many equal choices."""
    table = Table(title="Loss per character of the validation part")
    table.add_column("the next character, from", no_wrap=True)
    for column in ("nats", "bits", "choices"):
        table.add_column(column, justify="right")
    for name, loss in losses.items():
        cells = (f"{loss:.3f}", f"{loss / math.log(2):.2f}", f"{math.exp(loss):.1f}")
        table.add_row(name, *cells)
    return table


def outcome(
    records: Sequence[Mapping[str, float]],
) -> tuple[int, float | None, float | None]:
    """Returns the steps taken, the mean training loss of the last 100, the last validation loss."""
    train = [r["loss"] for r in records if "loss" in r]
    valid = [r["validation_loss"] for r in records if "validation_loss" in r]
    mean = float(np.mean(train[-100:])) if train else None
    return len(train), mean, valid[-1] if valid else None
