"""A small causal Transformer learns to write like Shakespeare, one character after the other.

Eight plays, a character for a token; AdamW with masked decay, warmup and cosine, clipping, dropout.
Ctrl-C saves a checkpoint, and ``--resume DIR`` goes on from the last one: the same run, bit for
bit. Uses a GPU or TPU if there is one, and all devices if several.
"""

import argparse
import importlib.metadata
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import jax
from _checkpoint import CheckpointError, Checkpoints, first_difference
from _cli import Interrupt, leave, on_interrupt
from _language import LanguageRun, Settings, Step
from _language_options import as_arguments, parse, settings_of
from _language_output import OldFolder, Records, draw_curves, outcome, outcome_table, write_text
from _output import Folder, save_figure
from _text import SMALL, Text, bigram_entropy, letter_entropy, load_text, words
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

REPORT_EVERY = 10  # steps between two looks at the device
EVALUATIONS = 8  # over a run


class Trainer:
    """Trains a run with a progress bar, a log, evaluations and checkpoints.

    Args:
      run: the run, at its start or where a checkpoint left it.
      folder: where the log goes.
      checkpoints: where the checkpoints go.
      every: steps between two of them.
      seconds: what the steps so far took.
    """

    def __init__(
        self, run: LanguageRun, folder: Folder, checkpoints: Checkpoints, every: int,
        seconds: float,
    ) -> None:  # fmt: skip
        self.run = run
        self.folder = folder
        self.records: Records = folder.records if isinstance(folder, OldFolder) else []
        self.seconds = seconds
        self.checkpoints = checkpoints
        self._every = every
        self._started: list[jax.Array] = []

    def train(self, console: Console, interrupt: Interrupt) -> None:
        """Takes the steps that are left; an interruption leaves a checkpoint of the last one."""
        total, done = self.run.settings.steps, self.run.steps_taken
        looks = {round(total * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
        start = time.perf_counter() - self.seconds
        with Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"), TimeRemainingColumn(), console=console,
            refresh_per_second=4,
        ) as progress:  # fmt: skip
            progress.add_task("char_lm", total=total, completed=done, seen="compiling")
            for step in range(done + 1, total + 1):
                self._started.append(self.run.step())
                if step % REPORT_EVERY == 0 or step in looks:
                    self._report(progress)
                if step in looks:
                    self._log([{"step": step, "validation_loss": self.run.evaluate()}])
                self.seconds = time.perf_counter() - start
                if step % self._every == 0 or step == total:
                    self._save(progress)
                try:
                    interrupt.check()
                except KeyboardInterrupt:
                    self._save(progress)
                    raise

    def _save(self, progress: Progress) -> None:
        """Logs, then saves: the log is never behind the checkpoint."""
        self._report(progress)
        about = {"settings": asdict(self.run.settings), "seconds": self.seconds}
        self.checkpoints.save(self.run.steps_taken, self.run.state, about)

    def _report(self, progress: Progress) -> None:
        """Waits for the steps that were started, and logs them."""
        if not self._started:
            return
        reports = [Step(*map(float, row)) for row in jax.device_get(self._started)]
        last = self.run.steps_taken
        first = last - len(reports) + 1
        self._log([{"step": i, **report._asdict()} for i, report in enumerate(reports, first)])
        self._started = []
        seen = f"loss {reports[-1].loss:.3f}  lr {reports[-1].learning_rate:.1e}"
        progress.update(progress.task_ids[0], completed=last, seen=seen)

    def _log(self, records: Records) -> None:
        self.records.extend(records)
        self.folder.log(records)


def write_sample(trainer: Trainer, text: Text, options: argparse.Namespace) -> dict[str, object]:
    """Lets the model write, prints and keeps it; returns what the summary says of it."""
    numbers = trainer.run.sample(
        text.encoded(options.prompt), options.sample_length, options.temperature,
        options.sample_seed,
    )  # fmt: skip
    written = text.decoded(numbers)
    write_text(trainer.folder.path / "sample.txt", options.prompt + written)
    known, said = text.words(), words(written)[:-1]  # the last may be cut off
    share = sum(word in known for word in said) / max(len(said), 1)
    print(f"\n{options.prompt}{written}\n")
    print(f"{share:.0%} of the {len(said)} words are words of the training part.")
    return {"temperature": options.temperature, "words": len(said), "known_words": share}


def finish(trainer: Trainer, text: Text, console: Console, sample: Mapping[str, object]) -> None:
    """Writes summary and figure of what has been trained, and prints the table."""
    run, records = trainer.run, trainer.records
    taken, train, valid = outcome(records)
    bigram = bigram_entropy(text.valid)
    trainer.folder.write_json("summary.json", {
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax")},
        "devices": run.devices, "settings": asdict(run.settings), "parameters": run.parameters,
        "steps_taken": taken, "finished": taken == run.settings.steps,
        "train_loss": train, "validation_loss": valid, "bigram_entropy": bigram,
        "seconds": round(trainer.seconds, 2), "sample": dict(sample),
    })  # fmt: skip
    files = ["metrics.jsonl", "summary.json"] + (["sample.txt"] if sample else [])
    if train is not None:
        save_figure(trainer.folder.path / "curves.png", draw_curves(records, run.settings, bigram))
        files.append("curves.png")
    if valid is not None:
        console.print(outcome_table({
            f"nothing: any of {len(text.characters)}": math.log(len(text.characters)),
            "how often each comes": letter_entropy(text.valid),
            "the one before: the best of all bigram models": bigram,
            f"the {run.settings.context} before: this model, {run.parameters:,} parameters": valid,
        }))  # fmt: skip
    files.append("checkpoints")
    console.print(f"Written to [bold]{trainer.folder.path}[/]: {', '.join(files)}", highlight=False)


def prepare(arguments: Sequence[str]) -> tuple[argparse.Namespace, Text, Settings]:
    """Reads options, text and settings; those of a run that goes on come from its checkpoint.

    Raises:
      CheckpointError: if there is none, or its settings are others than the options.
      ValueError: if options or text do not fit.
    """
    about, saved = __doc__.split("\n\n")[0], None
    options = parse(arguments, about)
    if options.resume:
        checkpoints = Checkpoints(options.resume / "checkpoints")
        saved = checkpoints.about(checkpoints.latest()).get("settings")
        if not isinstance(saved, dict):
            raise CheckpointError(f"{checkpoints.folder} must be of a run of char_lm.py")
        options = parse([*as_arguments(saved), *arguments], about)
    text = load_text(options.data or SMALL)
    settings = settings_of(options, text)
    difference = saved and first_difference(saved, asdict(settings))
    if difference:
        raise CheckpointError(
            f"--resume needs the same run: {difference}. "
            "Give the same --data and leave other options out, or start a new run"
        )
    return options, text, settings


def start(options: argparse.Namespace, text: Text, settings: Settings) -> Trainer:
    """Returns a trainer in a new folder, or where a checkpoint left it in an old one."""
    built = LanguageRun(settings, text)
    default = Path("runs") / f"char_lm-{datetime.now():%Y%m%d-%H%M%S}"
    path = options.resume or options.output or default
    checkpoints, seconds = Checkpoints(path / "checkpoints"), 0.0
    if options.resume:
        step = checkpoints.latest()
        built.state = checkpoints.restore(step, built.state)
        seconds = checkpoints.about(step).get("seconds", 0.0)
    folder = OldFolder(path, step) if options.resume else Folder(path)
    return Trainer(built, folder, checkpoints, options.checkpoint_every, seconds)


def run(trainer: Trainer, options: argparse.Namespace, text: Text, interrupt: Interrupt) -> int:
    """Trains, lets the model write and reports; returns the exit code."""
    console, sample, code = Console(), {}, 0
    try:
        trainer.train(console, interrupt)
        sample = write_sample(trainer, text, options)
        interrupt.check()
    except KeyboardInterrupt:
        hint = f" Go on with --resume {trainer.folder.path}" if trainer.checkpoints.steps() else ""
        print(f"Interrupted: what was logged is kept.{hint}")
        code = 130
    with on_interrupt(signal.SIG_IGN):  # it is a matter of seconds
        finish(trainer, text, console, sample)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    interrupt = Interrupt()
    try:
        options, text, settings = prepare(sys.argv[1:] if arguments is None else arguments)
        with jax.enable_x64(settings.dtype == "float64"), on_interrupt(interrupt.ask):
            return run(start(options, text, settings), options, text, interrupt)
    except KeyboardInterrupt:  # the second: the first waits for the step
        return 130
    except (ValueError, OSError) as error:
        print(f"char_lm.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    leave(main())
