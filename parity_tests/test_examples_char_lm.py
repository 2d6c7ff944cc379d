"""The character model does what it says: it stops, goes on bit for bit, and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)

# isort: split
from parity_tests.support.char_lm_runs import (
    EVERY,
    GRAPH,
    STEPS,
    TREE,
    logged_steps,
    no_figures,
    page,
    quick_compiler,
    records,
    resumed,
    run_of,
    saved_bits,
    tiny,
    whole,
)  # first: it finds the examples

# isort: split
import char_lm
from _checkpoint import Checkpoints
from _language import LanguageRun

__all__ = ["no_figures", "page", "quick_compiler", "whole"]


def test_a_run_leaves_a_log_a_summary_a_sample_a_figure_and_two_checkpoints(whole: Path) -> None:
    assert logged_steps(whole) == list(range(1, STEPS + 1))
    looks = [r["step"] for r in records(whole) if "validation_loss" in r]
    assert looks == sorted({round(STEPS * i / 8) for i in range(1, 9)})
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["finished"]
    assert summary["devices"] == 1
    assert summary["validation_loss"] == records(whole)[-1]["validation_loss"]
    assert len((whole / "sample.txt").read_text("utf-8")) == len("Ham.\n") + 4
    assert Checkpoints(whole / "checkpoints").steps() == [STEPS - EVERY, STEPS]
    names = {"metrics.jsonl", "summary.json", "sample.txt", "curves.png", "checkpoints"}
    assert {p.name for p in whole.iterdir()} == names


@contextmanager
def ctrl_c_in_step(patch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Sends Ctrl-C to this process while it takes a step."""
    take = LanguageRun.step

    def interrupted(self: LanguageRun) -> jax.Array:
        report = take(self)
        if self.steps_taken == step:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    with patch.context() as context:
        context.setattr(LanguageRun, "step", interrupted)
        yield


BROKEN = {
    # Options; the modes of NNX before and behind each stop.
    "unrolled": ((), (GRAPH, GRAPH, TREE)),
    "scanned": (("--depth=2", "--scan", "--remat"), (TREE, TREE)),
}
RANDOM = np.random.default_rng(6)
STOPS = {
    case: sorted(RANDOM.choice(np.arange(1, STEPS), len(modes) - 1, replace=False).tolist())
    for case, (_, modes) in BROKEN.items()
}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("case", "stops"), STOPS.items(), ids=[f"{c} stopped after {s}" for c, s in STOPS.items()]
)
def test_a_run_that_was_stopped_is_the_unbroken_one_bit_for_bit(
    case: str, stops: list[int], page: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more, modes = BROKEN[case]
    broken = tmp_path / "broken"
    if more:
        whole = tmp_path / "whole"
        assert char_lm.main(tiny(page, whole, *more)) == 0
    for i, graph in enumerate(modes):
        arguments = resumed(page, broken) if i else tiny(page, broken, *more)
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            if i == len(stops):
                assert char_lm.main(arguments) == 0
                break
            with ctrl_c_in_step(monkeypatch, stops[i]):
                assert char_lm.main(arguments) == 130
        assert logged_steps(broken) == list(range(1, stops[i] + 1))
        assert f"Go on with --resume {broken}" in capsys.readouterr().out
    like = run_of(page, **({"depth": 2, "scan": True} if more else {}))
    assert saved_bits(broken, like) == saved_bits(whole, like)
    for name in ("metrics.jsonl", "sample.txt"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    page: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log is ahead of the checkpoint, and its last line and next checkpoint are half there."""
    killed, take = tmp_path / "killed", LanguageRun.step

    def dies(self: LanguageRun) -> jax.Array:
        if self.steps_taken == 2 * EVERY - 1:
            raise MemoryError
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageRun, "step", dies)
        with pytest.raises(MemoryError):
            char_lm.main(tiny(page, killed))
    ahead = [r for r in records(whole) if EVERY < r["step"] < 2 * EVERY]
    with (killed / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps(record) + "\n" for record in ahead)
        log.write('{"step": 9, "lo')
    saved = killed / "checkpoints"
    shutil.copytree(saved / f"{EVERY}", saved / f"{2 * EVERY}")
    shutil.copytree(saved / f"{EVERY}", saved / f"{3 * EVERY}.orbax-checkpoint-tmp")
    assert char_lm.main(resumed(page, killed)) == 0
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert {path.name for path in saved.iterdir()} == {"8", "8.json", "12", "12.json"}


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_while_compiling_leaves_a_checkpoint_that_another_process_goes_on_from(
    page: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "char_lm.py"), *tiny(page, out)]
    # With what other tests have compiled, all twelve steps could be over before the signal.
    anew = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, text=True, env=anew
    ) as process:
        while process.poll() is None and not out.exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Interrupted: what was logged is kept." in said
    taken = logged_steps(out)
    assert 1 <= len(taken) < STEPS
    assert json.loads((out / "summary.json").read_text())["steps_taken"] == len(taken)
    assert char_lm.main(resumed(page, out)) == 0
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_writes_another_sample_and_learns_nothing(
    page: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    before = json.loads((out / "summary.json").read_text())
    arguments = ["--prompt", "Ber.\n", "--temperature", "0"]
    assert char_lm.main(resumed(page, out, *arguments)) == 0
    written = (out / "sample.txt").read_text("utf-8")
    assert written.startswith("Ber.\n")
    assert written in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    after = json.loads((out / "summary.json").read_text())
    same = ("seconds", "validation_loss", "steps_taken", "parameters")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def edited(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def halve(content: bytearray) -> None:
    del content[len(content) // 2 :]


def with_list(folder: Path, **changes: object) -> None:
    path = folder / "checkpoints" / "12.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGED = "checkpoint 12 is damaged. Delete "
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no finished checkpoint in "),
    "no list": (
        lambda out: [p.unlink() for p in out.glob("checkpoints/*.json")],
        "there is no finished checkpoint in ",
    ),
    "half a list": (lambda out: edited(out / "checkpoints/12.json", halve), DAMAGED),
    "a list of something else": (lambda out: with_list(out, files=[1]), DAMAGED),
    "later format": (lambda out: with_list(out, format=2), "must have format 1, got 2"),
    "no arrays": (lambda out: shutil.rmtree(out / "checkpoints/12"), DAMAGED),
    "half a file": (lambda out: edited(largest(out / "checkpoints/12"), halve), DAMAGED),
    "a flipped bit": (lambda out: edited(largest(out / "checkpoints/12"), flip), DAMAGED),
    "another program's": (lambda out: with_list(out, about={}), "must be of a run of char_lm.py"),
    "no log": (lambda out: (out / "metrics.jsonl").unlink(), "must have each step up to the"),
    "an option in the settings": (
        lambda out: with_list(out, about={"settings": {"width": "8 --output=/x"}}),
        "argument --width: must be a whole number at least 1, got 8 --output=/x",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_missing_or_damaged_is_refused_in_one_line(
    damage: str, page: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGE[damage]
    out = shutil.copytree(whole, tmp_path / "out")
    change(out)
    assert_refused(resumed(page, out), message, capsys)


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = char_lm.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--width=16", "width is 8 in the checkpoint and 16 here"),
        ("--scan", "scan is False in the checkpoint and True here"),
        ("--dtype=bfloat16", "dtype is 'float32' in the checkpoint and 'bfloat16' here"),
        ("--steps=13", "steps is 12 in the checkpoint and 13 here"),
        ("--dropout=0.2", "dropout is 0.1 in the checkpoint and 0.2 here"),
        (f"--data={EXAMPLES / 'char_lm.py'}", "characters is "),
        ("--output=x", "--output must be left out with --resume"),
    ],
)
def test_another_configuration_is_refused_by_name(
    option: str, message: str, page: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert_refused(resumed(page, whole, option), message, capsys)
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--heads=3", "--heads must divide --width, got 3 and 8"),
        ("--context=120", "--context must be below a tenth of the text, 120, got 120"),
        ("--temperature=nan", "must be a number at least 0, got nan"),
        ("--dropout=1.5", "must be a number from 0 to 1, got 1.5"),
        ("--prompt=§", "the text that the model learns has no '§'"),
        ("--prompt=", "--prompt must have a character or more"),
        ("--data=/nowhere", "--data must be a text file in UTF-8, got /nowhere"),
        (f"--data={sys.executable}", "--data must be a text file in UTF-8"),
        (f"--output={EXAMPLES}", "--output must be new or an empty folder"),
    ],
)
def test_bad_options_give_one_line_and_exit_code_2(
    option: str, message: str, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert_refused(tiny(page, out, option), message, capsys)
    assert not out.exists()
