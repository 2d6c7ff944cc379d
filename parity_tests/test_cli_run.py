"""``flaxstab parity run``: the tests of a checkout, and those of an installed wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flaxstab import cli
from flaxstab.cli import _run
from parity_tests.support.absent import why_absent
from parity_tests.test_cli import ROOT, run

needs_checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="pyproject.toml is not part of the wheel"
)


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the wheel in a folder of their own, as pip's --target leaves them."""
    folder = tmp_path_factory.mktemp("site")
    for package in ("flaxstab", "torch_ref", "parity_tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return folder


def start(place: Path, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Runs the command of the packages in a place, from another folder."""
    call = [sys.executable, "-m", "flaxstab.cli", "parity", "run", *words]
    env = {**os.environ, "PYTHONPATH": str(place)}
    return subprocess.run(call, capture_output=True, text=True, check=False, cwd=cwd, env=env)  # noqa: S603


def test_an_installed_wheel_is_tested_and_what_needs_the_checkout_is_listed(
    installed: Path, tmp_path: Path
) -> None:
    """Nothing of the folder where it is called plays a part; a warning is an error, as at home."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise SystemExit('a stranger')\n")
    planted = "import warnings\n\ndef test_it():\n    warnings.warn('as errors')\n"
    (installed / "parity_tests" / "test_planted.py").write_text(planted)
    files = ("test_files.py", "parity_tests/test_pytest_plugin.py", "test_planted.py::test_it")
    ended = start(installed, *files, "-q", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "not applicable here: 1 files" in ended.stdout
    listed = "parity_tests/test_pytest_plugin.py (whole): README.md is not part of the wheel\n"
    assert listed in ended.stdout
    assert "UserWarning: as errors" in ended.stdout
    assert re.search(r"^1 failed, [1-9]\d* passed, [12] skipped", ended.stdout, re.MULTILINE)


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 2), (5, 2)])
def test_the_exit_code_tells_how_pytest_ended(
    ends: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], ends)
    monkeypatch.setattr(_run.subprocess, "run", lambda *_, **__: ended)
    assert cli.main(["parity", "run"]) == code


def called(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> list[str]:
    """Returns the call that the command would make."""
    calls = []

    def record(call: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        calls.append(call)
        return subprocess.CompletedProcess(call, 0)

    monkeypatch.setattr(_run.subprocess, "run", record)
    assert cli.main(["parity", "run", *words]) == 0
    return calls[0][3:]


def test_options_are_passed_on_and_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = ROOT / "parity_tests"
    words = called(monkeypatch, ["-n", "2", "-k", "norms", "test_norms.py::test_x", "--lf"])
    assert words[-6:] == ["-n", "2", "-k", "norms", f"{tests / 'test_norms.py'}::test_x", "--lf"]
    assert called(monkeypatch, ["-x"])[-2:] == ["-x", str(tests)]


@needs_checkout
def test_a_checkout_is_tested_as_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    words = called(monkeypatch, [])
    assert words == ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "parity_tests")]


@needs_checkout
def test_a_wheel_is_tested_with_the_options_of_the_checkout() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    strict = [word for each in settings["filterwarnings"] for word in ("-W", each)]
    assert [*_run.OPTIONS] == [*settings["addopts"].split(), *strict]


def test_help_needs_no_framework() -> None:
    ended = run(["parity", "run", "--help"], "jax", "flax", "torch", "numpy", "pytest")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "passed on to pytest" in " ".join(ended.stdout.split())


def test_what_is_missing_is_named_in_one_line() -> None:
    ended = run(["parity", "run"], "pytest", "hypothesis", "jax")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("flaxstab: pytest, ")
    assert "flaxstab env says what is wrong" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_only_an_extra_that_is_absent_excuses_a_test() -> None:
    absent = ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    wrapped = RuntimeError("cannot collect")
    wrapped.__cause__ = absent
    assert why_absent(ModuleNotFoundError(name="no_such_module")) == ""
    assert why_absent(ValueError("torch")) == ""
    assert why_absent(wrapped) == why_absent(absent)
    assert bool(why_absent(absent)) is (not _run.find_spec("torch"))
