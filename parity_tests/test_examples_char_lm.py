"""The character model does what it says: it learns, stops, goes on bit for bit, and refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import _text
import char_lm
from _checkpoint import Checkpoints
from _language import LanguageRun, Settings

from parity_tests.support.layers import assert_same

STEPS, EVERY = 12, 4
# Eleven windows: no number of the eight devices but one divides them.
SIZES = {"width": 8, "depth": 1, "heads": 2, "context": 8, "batch_size": 11, "steps": STEPS}
GRAPH, TREE = True, False
State = dict[str, bytes]


@pytest.fixture(scope="module", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Compiles in a third of the time: these programs run a few steps only."""
    name = "jax_disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "true")  # for the processes that tests start
        before = jax.config.read(name)
        jax.config.update(name, True)
        yield
        jax.config.update(name, before)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of Hamlet, so that a look at the validation part is one call."""
    path = tmp_path_factory.mktemp("text") / "page.txt"
    path.write_text(_text.SMALL.read_text("utf-8")[5000:6200], "utf-8")
    return path


def tiny(page: Path, folder: Path, *more: str) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    return [*sizes, f"--checkpoint-every={EVERY}", "--sample-length=4", f"--data={page}",
            f"--output={folder}", *more]  # fmt: skip


def resumed(page: Path, folder: Path, *more: str) -> list[str]:
    return [f"--resume={folder}", f"--checkpoint-every={EVERY}", "--sample-length=4",
            f"--data={page}", *more]  # fmt: skip


def run_of(page: Path, **changes: object) -> LanguageRun:
    text = _text.load_text(page)
    chosen = {**SIZES, "text": text.digest, "characters": len(text.characters), **changes}
    return LanguageRun(Settings(**chosen), text)


def bits(tree: object) -> State:
    """Every array by name, as bytes; keys of dropout as what they are made of."""
    flat, _ = jax.tree.flatten_with_path(tree)
    plain = {
        jax.tree_util.keystr(path): jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for path, leaf in flat
    }
    return {name: np.asarray(leaf).tobytes() for name, leaf in plain.items()}


def saved_bits(folder: Path, like: LanguageRun) -> State:
    checkpoints = Checkpoints(folder / "checkpoints")
    return bits(checkpoints.restore(checkpoints.latest(), like.state))


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged_steps(folder: Path) -> list[int]:
    return [r["step"] for r in records(folder) if "loss" in r]


@pytest.fixture(scope="module")
def whole(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert char_lm.main(tiny(page, folder)) == 0
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(char_lm, "save_figure", lambda *_: None)


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
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


def test_batches_depend_on_seed_and_step_alone(page: Path) -> None:
    run = run_of(page, context=8)
    text = jnp.arange(12)  # four places for a window of nine
    steps = jnp.arange(20)

    batches = jax.jit(jax.vmap(run.batch, (0, None)))
    found = batches(steps, text)
    assert found.shape == (20, 11, 9)
    np.testing.assert_array_equal(
        found - found[..., :1], np.broadcast_to(np.arange(9), (20, 11, 9))
    )
    # 220 draws miss one of four places with a probability below 4 * 0.75 ** 220 = 1e-27.
    assert set(np.asarray(found[..., 0]).ravel()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(batches(steps[::-1], text)[::-1], found)
    assert (jax.jit(run_of(page, seed=1).batch)(steps[7], text) != found[7]).any()


@pytest.fixture(scope="module")
def wild(page: Path) -> LanguageRun:
    """A float64 model with weights so large that it has opinions."""
    with jax.enable_x64(True):
        run = run_of(page, dtype="float64")
        rng = np.random.default_rng(0)
        weights = nnx.filter_state(run.state["model"], nnx.Param)
        drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), weights)
        state = nnx.merge_state(run.state["model"], drawn)
        run.state = nnx.State({"model": state, "optimizer": run.state["optimizer"]})
        return run


ROWS = 64


def log_probabilities(run: LanguageRun, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Returns those that follow each character of each row: by one program, for all tests."""
    windows = np.zeros((ROWS, SIZES["context"]), np.int32)
    for window, row in zip(windows, rows, strict=False):
        window[: len(row)] = row
    logits = np.asarray(evaluated(run.state, jnp.asarray(windows), run._graph))
    shifted = logits - logits.max(-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return [found[i, : len(row)] for i, row in enumerate(rows)]


@partial(jax.jit, static_argnums=2)
def evaluated(state: nnx.State, windows: jax.Array, graph: nnx.GraphDef) -> jax.Array:
    model = nnx.merge(graph, state)["model"]
    model.eval()
    return model(windows)


def test_the_validation_loss_is_the_mean_over_every_character_but_the_first(
    page: Path, wild: LanguageRun
) -> None:
    valid = _text.load_text(page).valid
    assert (len(valid) - 1) % 8
    with jax.enable_x64(True):
        blocks = [valid[i : i + 9] for i in range(0, len(valid) - 1, 8)]
        found = log_probabilities(wild, [block[:-1] for block in blocks])
        terms = [
            -logs[np.arange(len(block) - 1), block[1:]]
            for logs, block in zip(found, blocks, strict=True)
        ]
        expected = np.concatenate(terms)
        assert expected.shape == (len(valid) - 1,)
        assert_same(np.float64(wild.evaluate()), expected.mean(), np.abs(expected).max())


def test_the_window_fills_up_then_moves_along(page: Path, wild: LanguageRun) -> None:
    prompt = _text.load_text(page).encoded("Ber.\n")
    with jax.enable_x64(True):
        found = np.concatenate([prompt, wild.sample(prompt, 40, 0.0, 0)])
        seen = [found[max(0, i - 8) : i] for i in range(len(prompt), len(found))]
        expected = [logs[-1].argmax() for logs in log_probabilities(wild, seen)]
        cold = wild.sample(prompt, 40, 0.0, 1)
    assert len(prompt) < 8
    assert len(set(found.tolist())) > 4
    np.testing.assert_array_equal(found[len(prompt) :], expected)
    np.testing.assert_array_equal(cold, found[len(prompt) :])


def test_sampling_follows_the_probabilities_and_is_compiled_once(
    page: Path, wild: LanguageRun
) -> None:
    text = _text.load_text(page)
    with jax.enable_x64(True):
        prompt = text.encoded("Ber.\nWho's there")  # longer than what the model sees
        before = wild._sample._cache_size()
        draws = [wild.sample(prompt, 1, 2.0, seed)[0] for seed in range(300)]
        short = wild.sample(prompt[:2], 1, 1.0, 0)
        (logs,) = log_probabilities(wild, [prompt[-8:]])
        logits = logs[-1] / 2
    shares = np.exp(logits) / np.exp(logits).sum()
    assert wild._sample._cache_size() == before + 1
    assert 0 <= short[0] < len(shares)
    counts = np.bincount(draws, minlength=len(shares))
    # Six standard deviations of each count, and one draw for those that hardly ever come.
    bound = 6 * np.sqrt(300 * shares * (1 - shares)) + 1
    assert np.all(np.abs(counts - 300 * shares) <= bound)


def test_eight_devices_give_the_numbers_of_one(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()
    assert len(devices) == 8
    found, runs = {}, {}
    with jax.enable_x64(True):
        for count in (1, 8):
            monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
            run = runs[count] = run_of(page, dtype="float64", batch_size=16, dropout=0.0)
            assert run.devices == count
            found[count] = np.stack([run.step() for _ in range(3)]), run.evaluate()
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(3, runs[8].state, {})
        moved = checkpoints.restore(3, runs[1].state)
        assert bits(moved) == bits(runs[8].state)
        assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(moved))
    # Loss, gradient norm, rate: sums over the batch in another order.
    bound = 4096 * np.finfo(np.float64).eps
    for one, eight in zip(found[1], found[8], strict=True):
        assert np.max(np.abs(one - eight)) <= bound * np.max(np.abs(one))


def test_a_step_moves_nothing_to_or_from_the_devices_and_compiles_once(page: Path) -> None:
    run = run_of(page)
    run.step()
    run.step()
    assert run._step._cache_size() == 1
    with jax.transfer_guard("disallow"):
        reports = [run.step() for _ in range(2)]
    assert np.isfinite(reports).all()


def test_options_reach_the_model(page: Path) -> None:
    run = run_of(page, dtype="bfloat16", depth=2, scan=True, remat=True)
    model = nnx.merge(run._graph, run.state)["model"]
    assert (model.blocks.scan, model.blocks.remat, model.dtype) == (True, True, jnp.bfloat16)
    state, report = jax.eval_shape(run._train_step, run.state, run._text)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), run.state
    )
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param))}
    assert kinds == {"float32"}
    assert report.dtype == jnp.float32


def test_the_text_is_cut_and_counted_as_a_loop_does(page: Path) -> None:
    text = _text.load_text(page)
    content = page.read_text("utf-8")
    assert text.decoded(np.concatenate([text.train, text.valid])) == content
    assert len(text.valid) == len(content) // 10
    np.testing.assert_array_equal(text.encoded(content[-120:]), text.valid)
    numbers = text.train.tolist()
    pairs, first = Counter(pairwise(numbers)), Counter(numbers[:-1])
    loss = -sum(n * math.log(n / first[a]) for (a, _), n in pairs.items()) / (len(numbers) - 1)
    assert_same(np.float64(_text.bigram_entropy(text.train)), np.float64(loss))
    letters = Counter(numbers[1:])
    loss = -sum(n * math.log(n / (len(numbers) - 1)) for n in letters.values()) / (len(numbers) - 1)
    assert_same(np.float64(_text.letter_entropy(text.train)), np.float64(loss))
    inputs, targets = _text.windows(text.valid, 8, 5)
    assert len(inputs) % 5 == 0
    seen = targets != _text.IGNORED
    np.testing.assert_array_equal(targets[seen], text.valid[1:])
    np.testing.assert_array_equal(inputs[seen], text.valid[:-1])
    assert _text.words("Who's there?\n--Nay, answer") == ["who's", "there", "nay", "answer"]
