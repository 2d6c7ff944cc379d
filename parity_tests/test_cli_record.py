"""``flaxstab parity record`` and ``diff``: files, exit codes, one line for what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from flaxstab import cli
from flaxstab.parity import read_baseline
from flaxstab.parity._record._suite import suite
from parity_tests.test_cli import run

CASES = ["--cases", "gelu", "adamw, float32", "dropout, mask*"]
RECORD, DIFF = ["parity", "record"], ["parity", "diff"]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "before.parity"
    assert cli.main([*RECORD, str(path), *CASES]) == 0
    return path


@pytest.fixture(scope="module")
def without_torch(before: Path) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    path = before.parent / "after.parity"
    words = [*RECORD, str(path), "--torch-from", str(before), *CASES, "l1 penalty"]
    return path, run(words, "torch")


def test_where_torch_is_absent_its_recorded_values_stand_for_it(
    without_torch: "tuple[Path, subprocess.CompletedProcess[str]]",
) -> None:
    path, ended = without_torch
    assert ended.returncode == 1, ended.stderr  # of a case that the first file does not have
    assert "4 cases, PyTorch's side recorded" in ended.stdout
    assert "l1 penalty: ValueError: the case must have been recorded" in ended.stdout
    made = read_baseline(path)
    assert made.torch == "recorded"
    assert {case.facts.torch for case in made.cases.values()} == {"recorded", "absent"}
    assert made.torch_environment["packages"]["torch"]


def test_the_same_environment_is_safe_also_beside_a_recorded_side(
    before: Path,
    without_torch: "tuple[Path, subprocess.CompletedProcess[str]]",
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [str(before), str(without_torch[0])]
    html, table = before.parent / "d.html", before.parent / "d.json"
    assert cli.main([*DIFF, *files, "--html", str(html), "--json", str(table)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("safe: of 4 cases 1 new, 3 same")
    assert "PyTorch's side of the new file is recorded" in said
    assert html.is_file()
    assert table.is_file()


def test_bad_files_are_refused_in_one_line(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, target = tmp_path / "broken.parity", str(tmp_path / "new.parity")
    broken.write_bytes(before.read_bytes()[:1000])
    absent = str(tmp_path / "none.parity")
    for words, said in (
        ([*DIFF, str(before), str(broken)], "broken.parity must be a baseline"),
        ([*DIFF, absent, str(before)], "which is not there"),
        ([*DIFF, str(before), str(before), "--json", f"{absent}/x"], "folder that exists"),
        ([*RECORD, target, "--torch-from", str(broken)], "broken.parity must be a baseline"),
        ([*RECORD, target, "--cases", "no such case"], "must fit the name of a case"),
        ([*RECORD, f"{absent}/x", "--cases", "gelu"], "folder must exist"),
        ([*RECORD, str(tmp_path), "--cases", "gelu"], "must be a file, not a folder"),
        ([*RECORD, "--cases", "gelu"], "FILE must name the baseline to write"),
    ):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not Path(target).exists()


def test_the_list_of_cases_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RECORD, "--list", "--cases", "gelu", "adamw*"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert {"gelu", "adamw, float32"} <= {*said.out.splitlines()}


def test_without_torch_record_says_what_stands_for_it(tmp_path: Path) -> None:
    ended = run([*RECORD, str(tmp_path / "a.parity")], "torch")
    assert ended.returncode == 2
    assert "torch cannot be imported" in ended.stderr


@pytest.mark.parametrize("command", ["record", "diff"])
def test_help_needs_no_framework(command: str) -> None:
    ended = run(["parity", command, "--help"], "jax", "flax", "optax", "torch", "numpy", "rich")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"usage: flaxstab parity {command}")


def test_the_suite_holds_every_shipped_layer_and_optimizer() -> None:
    names = suite()
    assert len(names) >= 57
    assert {"batch norm", "attention, dropout", "network of LN and GELU", "training step"} <= {
        *names
    }
    assert "flaxstab" in sys.modules
