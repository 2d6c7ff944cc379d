"""Document 2's mini project: BN+ReLU, GN+GELU and LN+GELU on real CIFAR-10 images.

Trains a small CNN with each normalisation at a normal and at a small batch size, in JAX, then
repeats the first steps in PyTorch with the same weights, batches and dropout masks and shows that
both frameworks compute the same. Uses a GPU or TPU if there is one, and all devices if several.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from _data import Cifar10, DataError, load_binary, load_small
from _output import Folder, Result, draw_agreement, draw_curves, largest_gaps
from _plan import Plan, Run, Step
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

VARIANTS = {
    "bn-relu": ("batch", "relu"),
    "gn-gelu": ("group", "gelu"),
    "ln-gelu": ("layer", "gelu"),
}
REPORT_EVERY = 25  # steps between two looks at the device
EVALUATIONS = 8  # over a run, besides the one before it


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def natural(text: str) -> int:
    """Returns a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


natural.__name__, positive.__name__ = "whole number >= 0", "whole number >= 1"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(prog="stable_block.py", description=__doc__.split("\n\n")[0])
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"any of {', '.join(VARIANTS)} (default: all)",
    )
    what.add_argument(
        "--framework",
        choices=("jax", "torch", "both"),
        default="jax",
        help="'both' trains the twins side by side and reports every step's "
        "difference (default: jax)",
    )
    what.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        default="float32",
        help="bfloat16 computes in it and keeps parameters and statistics in "
        "float32 (default: float32)",
    )
    size = parser.add_argument_group("how long")
    size.add_argument(
        "--epochs",
        type=positive,
        default=8,
        metavar="N",
        help="passes over the data at the normal batch size (default: 8)",
    )
    size.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="the normal batch size (default: 32)",
    )
    size.add_argument(
        "--small-batch",
        type=natural,
        default=4,
        metavar="N",
        help="the small batch size; 0 leaves those runs out (default: 4)",
    )
    size.add_argument(
        "--small-epochs",
        type=positive,
        default=1,
        metavar="N",
        help="passes over the data at the small batch size (default: 1)",
    )
    size.add_argument(
        "--twin-steps",
        type=natural,
        default=20,
        metavar="N",
        help="steps that are repeated beside PyTorch in float64 at the end; 0 for "
        "none (default: 20)",
    )
    where = parser.add_argument_group("where from and where to")
    where.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with CIFAR-10's official binary version (default: the 6,000 "
        "images that ship with the repository)",
    )
    where.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new folder for logs and figures (default: runs/stable_block-TIME)",
    )
    where.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of weights, batches and dropout (default: 0)",
    )
    return parser.parse_args(arguments)  # fmt: skip


def plans(options: argparse.Namespace, train_size: int) -> list[Plan]:
    """Returns the runs that the options ask for.

    Raises:
      DataError: if a batch is larger than the data.
    """
    sizes = [(options.batch_size, options.epochs)]
    if options.small_batch and options.framework != "both":
        sizes.append((options.small_batch, options.small_epochs))
    for size, _ in sizes:
        if size > train_size:
            raise DataError(f"the batch must not be larger than the data: {size} > {train_size}")
    return [
        Plan(variant=variant, norm=VARIANTS[variant][0], act=VARIANTS[variant][1],
             batch_size=size, epochs=epochs, train_size=train_size,
             seed=options.seed, dtype=options.dtype)
        for size, epochs in sizes
        for variant in options.variants
    ]  # fmt: skip


def make_run(framework: str, plan: Plan, data: Cifar10) -> Run:
    """Builds one run; PyTorch is imported only if it takes part."""
    if framework == "jax":
        from _jax_side import JaxRun

        return JaxRun(plan, data)
    if framework == "torch":
        from _torch_side import TorchRun

        return TorchRun(plan, data)
    from _both import BothRuns

    return BothRuns(plan, data)


class Trainer:
    """Trains runs one after the other, with a progress bar, a log and an evaluation per epoch.

    Args:
      folder: where the log goes.
      console: where the progress goes.
    """

    def __init__(self, folder: Folder, console: Console) -> None:
        self.folder = folder
        self.results: list[Result] = []
        self._console = console

    def _bar(self, plan: Plan, limit: int) -> Progress:
        beside = " beside PyTorch" if limit < plan.total_steps else ""
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"), TimeRemainingColumn(), console=self._console,
            refresh_per_second=4,
        )  # fmt: skip
        progress.add_task(plan.name + beside, total=limit, seen="compiling")
        return progress

    def train(self, framework: str, plan: Plan, data: Cifar10, steps: int | None = None) -> Result:
        """Trains one run, or its first steps; what is logged stays if it is interrupted."""
        result = Result(plan)
        self.results.append(result)
        limit = plan.total_steps if steps is None else min(steps, plan.total_steps)
        with self._bar(plan, limit) as progress:
            start = time.perf_counter()
            run = make_run(framework, plan, data.normalized(plan.storage))
            result.gaps = getattr(run, "gaps", ())
            self._evaluate(run, result)
            for order in plan.orders():
                self._epoch(run, order, result, limit, progress)
                result.seconds = time.perf_counter() - start
                if len(result.steps) == limit:
                    break
        if framework == "both":
            result.twin = run.evaluate_twin()
        return result

    def _epoch(
        self, run: Run, order: np.ndarray, result: Result, limit: int, progress: Progress
    ) -> None:
        before = len(result.steps)
        run.start_epoch(order)
        count = min(result.plan.steps_per_epoch, limit - before)
        looks = {round(limit * i / EVALUATIONS) - before for i in range(1, EVALUATIONS + 1)}
        for done in range(1, count + 1):
            run.step()
            if done % REPORT_EVERY == 0 or done == count or done in looks:
                self._report(run.reports(len(result.steps) - before, done), result, progress)
            if done in looks:
                self._evaluate(run, result)

    def _evaluate(self, run: Run, result: Result) -> None:
        evaluation, steps = run.evaluate(), len(result.steps)
        result.evaluations.append((steps, evaluation))
        record = {"run": result.plan.name, "dtype": result.plan.dtype, "step": steps}
        test = {"test_loss": evaluation.loss, "test_accuracy": evaluation.accuracy}
        self.folder.log([{**record, **test}])

    def _report(self, steps: Sequence[Step], result: Result, progress: Progress) -> None:
        start = len(result.steps)
        result.steps.extend(steps)
        records = []
        for i, step in enumerate(steps, start):
            gap = vars(result.gaps[i]) if result.gaps else None
            record = {"run": result.plan.name, "dtype": result.plan.dtype, "step": i + 1}
            records.append({**record, **vars(step), **({"gap": gap} if gap else {})})
        self.folder.log(records)
        accuracy = float(np.mean([s.accuracy for s in result.steps[-100:]]))
        seen = f"loss {steps[-1].loss:.3f}  acc {accuracy:.2f}  lr {steps[-1].learning_rate:.1e}"
        progress.update(progress.task_ids[0], completed=len(result.steps), seen=seen)


def outcome_table(results: Sequence[Result]) -> Table:
    """Returns the table at the end."""
    table = Table(title=f"The mini project on CIFAR-10, {results[0].plan.dtype}")
    for column in ("run", "steps", "train loss", "test loss", "test accuracy", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for result in results:
        last = result.evaluations[-1][1] if result.evaluations else None
        loss = np.mean([s.loss for s in result.steps[-100:]]) if result.steps else np.nan
        table.add_row(
            result.plan.name, f"{len(result.steps)}", f"{loss:.3f}",
            f"{last.loss:.3f}" if last else "-", f"{last.accuracy:.1%}" if last else "-",
            f"{result.seconds:.0f}",
        )  # fmt: skip
    return table


def agreement_table(results: Sequence[Result]) -> Table:
    """Returns the table of largest relative differences between JAX and PyTorch."""
    table = Table(
        title="JAX beside PyTorch: same weights, batches and dropout masks, "
        f"{results[0].plan.dtype}",
        caption="Largest relative difference at any step. The last column is JAX against itself, "
        "started one eps away: what rounding alone does.",
    )
    for column in ("run", "steps", "loss", "weights", "statistics", "optimizer", "1 eps apart"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for result in results:
        gaps = largest_gaps(result.gaps)
        table.add_row(result.plan.name, str(len(result.gaps)),
                      *(f"{value:.1e}" for value in gaps.values()))  # fmt: skip
    return table


def twin_proof(trainer: Trainer, options: argparse.Namespace, data: Cifar10) -> list[Result]:
    """Repeats the first steps of each variant beside PyTorch, in float64."""
    if options.framework != "jax" or not options.twin_steps:
        return []
    if importlib.util.find_spec("torch") is None:
        trainer.folder.log([{"note": "PyTorch is not installed: no steps beside it"}])
        return []
    results = []
    for plan in plans(argparse.Namespace(**{**vars(options), "dtype": "float64", "small_batch": 0}),
                      len(data.train_labels)):  # fmt: skip
        with jax.enable_x64(True):
            results.append(trainer.train("both", plan, data, options.twin_steps))
    return results


def finish(folder: Folder, console: Console, results: Sequence[Result]) -> None:
    """Prints the tables and writes summary and figures of what has been trained."""
    compared = [r for r in results if r.gaps]
    trained = [r for r in results if r.steps and (not r.gaps or r.finished)]
    figures = ["curves.png"] if trained else []
    if trained:
        folder.save_figure("curves.png", draw_curves(trained))
        console.print(outcome_table(trained))
    if compared:
        folder.save_figure("agreement.png", draw_agreement(compared))
        figures.append("agreement.png")
        console.print(agreement_table(compared))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    folder.write_json("summary.json", {
        "versions": versions, "devices": [str(d) for d in jax.devices()],
        "runs": [r.summary() for r in results],
    })  # fmt: skip
    files = ", ".join(["metrics.jsonl", "summary.json", *figures])
    console.print(f"Written to [bold]{folder.path}[/]: {files}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    options = parse(arguments)
    with jax.enable_x64(options.dtype == "float64"):
        return run(options, Console())


def run(options: argparse.Namespace, console: Console) -> int:
    """Trains what the options ask for; returns the exit code."""
    try:
        if options.framework != "jax" and importlib.util.find_spec("torch") is None:
            raise DataError(
                f"--framework {options.framework} needs PyTorch: pip install -c constraints.txt "
                "-e '.[torch]'"
            )
        data = load_small() if options.data is None else load_binary(options.data)
        wanted = plans(options, len(data.train_labels))
        default = Path("runs") / f"stable_block-{datetime.now():%Y%m%d-%H%M%S}"
        folder = Folder(options.output or default)
    except (ValueError, OSError) as error:
        print(f"stable_block.py: {error}", file=sys.stderr)
        return 2
    trainer, code = Trainer(folder, console), 0
    try:
        for plan in wanted:
            trainer.train(options.framework, plan, data)
        twin_proof(trainer, options, data)
    except KeyboardInterrupt:
        console.print("Interrupted: what was logged is kept.")
        code = 130
    finish(folder, console, trainer.results)
    return code


if __name__ == "__main__":
    sys.exit(main())
