"""Document 2's mini project: BN+ReLU, GN+GELU and LN+GELU on real CIFAR-10 images.

Trains a small CNN with each normalisation at a normal and at a small batch size, in JAX, then
repeats the first steps in PyTorch with the same weights, batches and dropout masks and shows that
both frameworks compute the same. Uses a GPU or TPU if there is one, and all devices if several.
"""

import argparse
import importlib.metadata
import importlib.util
import signal
import sys
import time
from collections.abc import Container, Sequence
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
from _cli import LARGEST_SEED, Interrupt, Parser, leave, on_interrupt, whole
from _data import Cifar10, DataError, load_binary, load_small
from _output import Folder, Result, draw_agreement, draw_curves, largest_gaps, save_figure
from _plan import EvaluatesTwin, Plan, Run, Step
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
        type=whole(1),
        default=8,
        metavar="N",
        help="passes over the data at the normal batch size (default: 8)",
    )
    size.add_argument(
        "--batch-size",
        type=whole(1),
        default=32,
        metavar="N",
        help="the normal batch size (default: 32)",
    )
    size.add_argument(
        "--small-batch",
        type=whole(0),
        default=4,
        metavar="N",
        help="the small batch size; 0 leaves those runs out (default: 4)",
    )
    size.add_argument(
        "--small-epochs",
        type=whole(1),
        default=1,
        metavar="N",
        help="passes over the data at the small batch size (default: 1)",
    )
    size.add_argument(
        "--twin-steps",
        type=whole(0),
        default=20,
        metavar="N",
        help="steps beside PyTorch, in float64, at the end; 0 for none (default: 20)",
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
        type=whole(0, LARGEST_SEED),
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
    if options.small_batch not in (0, options.batch_size) and options.framework != "both":
        sizes.append((options.small_batch, options.small_epochs))
    for size, _ in sizes:
        if size > train_size:
            raise DataError(f"the batch must not be larger than the data: {size} > {train_size}")
    return [
        Plan(variant=variant, norm=VARIANTS[variant][0], act=VARIANTS[variant][1],
             batch_size=size, epochs=epochs, train_size=train_size,
             seed=options.seed, dtype=options.dtype)
        for size, epochs in sizes
        for variant in dict.fromkeys(options.variants)
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
      interrupt: asked after each step.
    """

    def __init__(self, folder: Folder, console: Console, interrupt: Interrupt) -> None:
        self.folder = folder
        self._interrupt = interrupt
        self.results: list[Result] = []
        self._console = console

    def _bar(self, plan: Plan, label: str) -> Progress:
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"), TimeRemainingColumn(), console=self._console,
            refresh_per_second=4,
        )  # fmt: skip
        progress.add_task(plan.name + label, total=plan.total_steps, seen="compiling")
        return progress

    def train(
        self, framework: str, plan: Plan, data: Cifar10, *, label: str = "", tested: bool = True
    ) -> None:
        """Trains one run; what is logged stays if it is interrupted.

        Args:
          framework: 'jax', 'torch' or 'both'.
          plan: the run's settings.
          data: images as bytes.
          label: what to add to the run's name in the progress bar.
          tested: whether to look at the test set, before, after and in between.
        """
        result = Result(plan)
        self.results.append(result)
        total = plan.total_steps
        looks = {round(total * i / EVALUATIONS) for i in range(EVALUATIONS + 1)} if tested else ()
        with self._bar(plan, label) as progress:
            start = time.perf_counter()
            run = make_run(framework, plan, data.normalized(plan.storage))
            result.gaps, result.devices = run.gaps, run.devices
            for order in plan.orders():
                self._epoch(run, order, result, looks, progress)
                result.seconds = time.perf_counter() - start
        if isinstance(run, EvaluatesTwin) and tested:
            result.twin = run.evaluate_twin()

    def _epoch(
        self, run: Run, order: np.ndarray, result: Result, looks: Container[int],
        progress: Progress,
    ) -> None:  # fmt: skip
        before, count = len(result.steps), result.plan.steps_per_epoch
        run.start_epoch(order)
        if before == 0 and before in looks:
            self._evaluate(run, result)
        for done in range(1, count + 1):
            run.step()
            look = before + done in looks
            if done % REPORT_EVERY == 0 or done == count or look:
                self._report(run.reports(len(result.steps) - before, done), result, progress)
            if look:
                self._evaluate(run, result)
            self._interrupt.check()

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
        caption="Largest relative difference at any step: loss, weights, running statistics, "
        "optimizer state. '1 eps': weights of JAX against JAX started one eps away.",
    )
    table.add_column("run", no_wrap=True)
    for column in ("steps", "loss", "weights", "stats", "optimizer", "1 eps"):
        table.add_column(column, justify="right")
    for result in results:
        gaps = largest_gaps(result.gaps)
        table.add_row(result.plan.name, str(len(result.gaps)),
                      *(f"{value:.1e}" if value else "0" for value in gaps.values()))  # fmt: skip
    return table


def twin_proof(trainer: Trainer, options: argparse.Namespace, data: Cifar10) -> None:
    """Trains each variant a few steps beside PyTorch, in float64."""
    if options.framework != "jax" or not options.twin_steps:
        return
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: no steps beside it.")
        trainer.folder.log([{"note": "PyTorch is not installed: no steps beside it"}])
        return
    for variant in dict.fromkeys(options.variants):
        # A whole schedule in so many steps: the learning rate climbs and falls.
        plan = Plan(
            variant=variant, norm=VARIANTS[variant][0], act=VARIANTS[variant][1],
            batch_size=options.batch_size, epochs=1, seed=options.seed, dtype="float64",
            train_size=min(options.twin_steps * options.batch_size, len(data.train_labels)),
        )  # fmt: skip
        with jax.enable_x64(True):
            trainer.train("both", plan, data, label=" beside PyTorch", tested=False)


def finish(folder: Folder, console: Console, results: Sequence[Result]) -> None:
    """Writes summary and figures of what has been trained, and prints the tables."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    folder.write_json("summary.json", {
        "versions": versions, "devices": [str(d) for d in jax.devices()],
        "runs": [r.summary() for r in results],
    })  # fmt: skip
    compared = [r for r in results if r.gaps]
    trained = [r for r in results if r.steps and r.evaluations]
    figures = ["curves.png"] if trained else []
    if trained:
        save_figure(folder.path / "curves.png", draw_curves(trained))
        console.print(outcome_table(trained))
    if compared:
        save_figure(folder.path / "agreement.png", draw_agreement(compared))
        figures.append("agreement.png")
        console.print(agreement_table(compared))
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
    code = 0
    interrupt = Interrupt()
    trainer = Trainer(folder, console, interrupt)
    with on_interrupt(interrupt.ask):
        try:
            for plan in wanted:
                trainer.train(options.framework, plan, data)
            twin_proof(trainer, options, data)
        except KeyboardInterrupt:
            console.print("Interrupted: what was logged is kept.")
            code = 130
    with on_interrupt(signal.SIG_IGN):  # it is a matter of seconds
        finish(folder, console, trainer.results)
    return code


if __name__ == "__main__":
    leave(main())
