"""The examples do what they say: small runs of each, their errors, their outputs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import _data
import _jax_side
import _output
import _plan
import small_batch
import stable_block
import variance_propagation

AGREEMENT = 1e-8  # the bound on JAX against PyTorch over a float64 run


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> _data.Cifar10:
    """Ninety-six training images, so that a run takes seconds."""
    whole = _data.load_small()
    parts = [array[::52] if i < 2 else array[::20] for i, array in enumerate(whole)]
    data = _data.Cifar10(*parts)
    for module in (stable_block, small_batch):
        monkeypatch.setattr(module, "load_small", lambda: data)
    return data


@pytest.fixture(autouse=True)
def one_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests that are not about devices on one of the eight."""
    if "devices" not in request.node.name:
        mesh = _jax_side.data_mesh(1)
        monkeypatch.setattr(_jax_side, "data_mesh", lambda _: mesh)


def plan(**changes: object) -> _plan.Plan:
    settings = {"variant": "bn-relu", "norm": "batch", "act": "relu", "batch_size": 8, "epochs": 1,
                "train_size": 97, "widths": (8, 8), "groups": 4}  # fmt: skip
    return _plan.Plan(**{**settings, **changes})


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_main_job_trains_the_variants_and_shows_that_pytorch_agrees(
    small_data: _data.Cifar10, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--epochs", "2", "--small-batch", "16", "--twin-steps", "2", "--output", str(out)]
    variants = ["bn-relu", "gn-gelu"]
    assert stable_block.main([*arguments, "--variants", *variants]) == 0
    runs = json.loads((out / "summary.json").read_text())["runs"]
    assert [(r["variant"], r["batch_size"]) for r in runs] == [
        (v, b) for b in (32, 16, 32) for v in variants
    ]
    assert all(r["finished"] for r in runs[:4])
    for twin in runs[4:]:
        assert twin["dtype"] == "float64"
        assert twin["steps_taken"] == 2
        assert max(twin["largest_gap"].values()) <= AGREEMENT
    steps = [r for r in records(out) if r["run"] == "gn-gelu@32" and "loss" in r]
    float32 = [r["step"] for r in steps if r["dtype"] == "float32"]
    assert float32 == list(range(1, 2 * (len(small_data.train_labels) // 32) + 1))
    assert [r["devices"] for r in runs] == [1] * len(runs)
    assert {p.name for p in out.iterdir()} == {
        "metrics.jsonl", "summary.json", "curves.png", "agreement.png",
    }  # fmt: skip
    assert "JAX beside PyTorch" in capsys.readouterr().out


def test_both_frameworks_agree_at_every_step_of_a_float64_run(
    small_data: _data.Cifar10, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--framework", "both", "--dtype", "float64", "--variants", "bn-relu", "--epochs",
                 "2", "--output", str(out)]  # fmt: skip
    assert stable_block.main(arguments) == 0
    (summary,) = json.loads((out / "summary.json").read_text())["runs"]
    assert max(summary["largest_gap"].values()) <= AGREEMENT
    assert summary["torch_test_accuracy"] == summary["test_accuracy"]
    gaps = [r["gap"] for r in records(out) if "gap" in r]
    assert len(gaps) == summary["steps_taken"] == 2 * (len(small_data.train_labels) // 32)


def test_pytorch_alone_trains_with_the_same_options(
    small_data: _data.Cifar10, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--framework", "torch", "--dtype", "bfloat16", "--variants", "ln-gelu",
                 "--epochs", "1", "--small-batch", "0", "--output", str(out)]  # fmt: skip
    assert stable_block.main(arguments) == 0
    (summary,) = json.loads((out / "summary.json").read_text())["runs"]
    assert summary["finished"]
    assert summary["train_size"] == len(small_data.train_labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "xn-relu"], "invalid choice: 'xn-relu'"),
        (["--epochs", "0"], "must be a whole number at least 1, got 0"),
        (["--seed", "99999999999"], "must be a whole number from 0 to"),
        (["--data", "/nowhere"], "--data must be a folder, got /nowhere"),
        (["--batch-size", "6000"], "the batch must not be larger than the data: 6000 > 5000"),
        (["--output", str(EXAMPLES)], "--output must be new or an empty folder"),
    ],
)
def test_bad_options_give_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = stable_block.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (small_batch, ["--samples", "10"], "must be a whole number from 64 to 5000, got 10"),
        (small_batch, ["--seed", "-1"], "must be a whole number from 0 to"),
        (variance_propagation, ["--seeds", "x"], "must be a whole number from 1 to 1000, got x"),
        (variance_propagation, ["--output", "/proc/x"], "--output must be a folder that can be"),
    ],
)
def test_the_other_examples_say_in_one_line_what_is_wrong(
    module: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert said.count("\n") == 1


BLOCK_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torch_ref"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv.pop(1))
import importlib.util
importlib.util.find_spec = lambda name, *a: None
import stable_block
sys.exit(stable_block.main(sys.argv[1:]))
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK_TORCH, str(EXAMPLES), *arguments]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=plain)  # noqa: S603


def test_the_main_job_runs_without_torch_and_says_so(tmp_path: Path) -> None:
    done = without_torch("--variants", "bn-relu", "--batch-size", "250", "--epochs", "1",
                         "--small-batch", "0", "--output", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "PyTorch is not installed: no steps beside it" in done.stdout
    refused = without_torch("--framework", "both")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--framework both needs PyTorch" in refused.stderr


def test_an_interruption_while_compiling_ends_quietly(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "stable_block.py"), "--variants", "bn-relu",
               "--twin-steps", "0", "--output", str(tmp_path / "out")]  # fmt: skip
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain) as process:  # noqa: S603
        log = tmp_path / "out" / "metrics.jsonl"
        while process.poll() is None and not log.exists():
            time.sleep(0.05)
        time.sleep(1)  # the test set was looked at; now the step compiles
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted: what was logged is kept." in said
    assert not json.loads((tmp_path / "out" / "summary.json").read_text())["runs"][0]["finished"]


def write_binary(folder: Path, records: int, label: int = 3) -> None:
    rng = np.random.default_rng(0)
    for name in (*_data.TRAIN_FILES, _data.TEST_FILE):
        rows = rng.integers(0, 256, (records, _data.RECORD), np.uint8)
        rows[:, 0] = label
        rows.tofile(folder / name)


def test_the_binary_version_is_read_as_channels_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_data, "RECORDS", 4)
    write_binary(tmp_path, 4)
    data = _data.load_binary(tmp_path)
    assert data.train_images.shape == (20, 32, 32, 3)
    raw = np.fromfile(tmp_path / "data_batch_1.bin", np.uint8).reshape(4, -1)
    assert data.train_images[1, 5, 7, 2] == raw[1, 1 + 2 * 1024 + 5 * 32 + 7]
    assert set(data.train_labels) == {3}


def test_bad_binary_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_data, "RECORDS", 4)
    with pytest.raises(_data.DataError, match=r"data_batch_1\.bin is missing"):
        _data.load_binary(tmp_path)
    write_binary(tmp_path, 4)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x00" * 100)
    with pytest.raises(_data.DataError, match=r"data_batch_3\.bin has 100 bytes and should have"):
        _data.load_binary(tmp_path)
    write_binary(tmp_path, 4, label=77)
    with pytest.raises(_data.DataError, match="holds the label 77"):
        _data.load_binary(tmp_path)


def test_an_interruption_keeps_what_was_logged(
    small_data: _data.Cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = _jax_side.JaxRun.step, []

    def interrupted(self: _jax_side.JaxRun) -> None:
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(_jax_side.JaxRun, "step", interrupted)
    out = tmp_path / "out"
    arguments = ["--batch-size", "2", "--epochs", "1", "--output", str(out)]
    handler = signal.getsignal(signal.SIGINT)
    assert stable_block.main(arguments) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert len([r for r in records(out) if "loss" in r]) >= stable_block.REPORT_EVERY
    (summary,) = json.loads((out / "summary.json").read_text())["runs"]
    assert not summary["finished"]
    assert summary["train_size"] == len(small_data.train_labels)
    assert (out / "curves.png").exists()


def test_nothing_is_half_written(tmp_path: Path) -> None:
    folder = _output.Folder(tmp_path)
    folder.write_json("a.json", {"x": 1})
    with pytest.raises(TypeError):
        folder.write_json("a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_bfloat16_keeps_parameters_and_statistics_in_float32() -> None:
    model, optimizer = _jax_side.build(plan(dtype="bfloat16"))
    kept = jax.tree.leaves((nnx.state(model, (nnx.Param, nnx.BatchStat)), optimizer.opt_state))
    kinds = {leaf.dtype.name for leaf in kept}
    assert kinds <= {"float32", "int32", "bool"}
    assert model(np.zeros((2, 32, 32, 3), np.float32)).dtype == jax.numpy.bfloat16


def test_a_step_moves_nothing_to_or_from_the_devices_and_compiles_once(
    small_data: _data.Cifar10,
) -> None:
    settings = plan()
    run = _jax_side.JaxRun(settings, small_data.normalized(settings.storage))
    order = next(settings.orders())
    run.start_epoch(order)
    run.step()
    run.start_epoch(order)
    run.step()
    assert run._step._cache_size() == 1
    with jax.transfer_guard("disallow"):
        run.step()
        run.step()
    assert all(np.isfinite(report.loss) for report in run.reports(0, 1))


def test_eight_devices_give_the_numbers_of_one(
    small_data: _data.Cifar10, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()
    assert len(devices) == 8
    with jax.enable_x64(True):
        settings = plan(dtype="float64")
        data, weights = small_data.normalized(settings.storage), {}
        for count in (1, 8):
            monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
            run = _jax_side.JaxRun(settings, data)
            assert _jax_side.data_mesh(settings.batch_size).size == count
            run.start_epoch(next(settings.orders()))
            for _ in range(4):
                run.step()
            state = nnx.state(run.model, (nnx.Param, nnx.BatchStat))
            weights[count] = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            assert run.evaluate().loss > 0
    for one, eight in zip(weights[1], weights[8], strict=True):
        # 4 AdamW steps of size lr turn rounding of the gradient into at most that share of it.
        bound = 4096 * np.finfo(np.float64).eps * np.max(np.abs(one))
        assert np.max(np.abs(one - eight)) <= bound


def test_batches_are_spread_over_the_devices_that_divide_them() -> None:
    assert _jax_side.data_mesh(12).size == 6
    assert _jax_side.data_mesh(7).size == 7
    assert _jax_side.data_mesh(1).size == 1


def test_xavier_halves_the_variance_at_every_layer_and_kaiming_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert variance_propagation.main(["--seeds", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "variance.png").exists()
    assert "largest relative difference" in capsys.readouterr().out
    for name, expected in variance_propagation.EXPECTED.items():
        _, _, measured = variance_propagation.spreads(name, 3)
        # 512 units: the second moment of a layer wanders by about sqrt(5 / 512) per layer.
        assert np.max(np.abs(np.log(measured / expected))) < 5 * np.sqrt(10 * 5 / 512)


def test_accumulation_is_ghost_batch_normalisation() -> None:
    data = _data.load_small().normalized(np.dtype("float32"))
    whole, ghost = small_batch.accumulation_gap("batch", data)
    assert whole > 0.1
    assert ghost < 1e4 * np.finfo(np.float32).eps
    whole, _ = small_batch.accumulation_gap("group", data)
    assert whole < 1e4 * np.finfo(np.float32).eps


def test_small_batches_disturb_batch_normalisation_alone(small_data: _data.Cifar10) -> None:
    images = small_data.normalized(np.dtype("float32")).train_images
    noise = {
        n: [small_batch.companion_noise(n, b, images) for b in (2, 32)] for n in ("batch", "group")
    }
    assert noise["batch"][0] > 2 * noise["batch"][1] > 0
    assert max(noise["group"]) < 1e3 * np.finfo(np.float32).eps


def test_the_small_batch_example_trains_prints_and_draws(
    small_data: _data.Cifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = small_data.normalized(np.dtype("float32"))
    assert 0 < small_batch.accuracy("ghost", 32, data, 64, 0) <= 1
    # The rest of the example without its twelve other trainings.
    monkeypatch.setattr(small_batch, "accuracy", lambda *_: 0.25)
    monkeypatch.setattr(small_batch, "BATCHES", (32,))
    monkeypatch.setattr(small_batch, "COMPANIES", 2)
    assert small_batch.main(["--samples", "64", "--output", str(tmp_path)]) == 0
    assert "25.0%" in capsys.readouterr().out
    assert (tmp_path / "small_batch.png").exists()
