"""The command line: what it needs, what it says, how it exits."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flaxstab import cli
from flaxstab.parity import _selftest
from flaxstab.parity._selftest import Table
from flaxstab.parity._selftest._table import Clean
from parity_tests.support.absent import needs_torch

ROOT = Path(__file__).parents[1]
COMMAND = ["parity", "selftest"]

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
from flaxstab.cli import main
sys.exit(main({arguments}))
"""


def run(arguments: list[str], *blocked: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command in a fresh interpreter that cannot import some packages."""
    code = BLOCK.format(names=blocked, arguments=arguments)
    call = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603


@pytest.mark.parametrize("words", [["--help"], ["parity", "--help"], [*COMMAND, "--help"]])
def test_help_needs_no_framework(words: list[str]) -> None:
    ended = run(words, "jax", "jaxlib", "flax", "optax", "torch", "numpy")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: flaxstab")


def test_a_missing_framework_is_named_in_one_line() -> None:
    ended = run(COMMAND, "torch")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "flaxstab: torch cannot be imported. Install them: pip install 'flaxstab[torch]'.\n"
    )


@pytest.mark.parametrize(
    "words", [[], ["parity"], ["parity", "none"], [*COMMAND, "--side", "left"], ["--seed", "x"]]
)
def test_bad_arguments_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: flaxstab" in capsys.readouterr().err


@needs_torch
def test_an_unknown_fault_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--only", "no such fault"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("flaxstab: only must be the name of a fault, got only='no such")
    assert said.err.count("\n") == 1


@needs_torch
@pytest.mark.parametrize(("alarms", "code"), [((), 0), (("output",), 1)])
def test_the_exit_code_tells_whether_the_self_test_passed(
    alarms: tuple[str, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = []

    def run(*arguments: object, told: Callable[[str], None]) -> Table:
        told("1/1 a fault")
        given.append(arguments)
        return Table((), (Clean("gelu", alarms, 0.5),))

    monkeypatch.setattr(_selftest, "run", run)
    assert cli.main([*COMMAND, "--seed", "7", "--side", "both", "--only", "a", "b"]) == code
    assert given == [(7, "both", ["a", "b"])]
    assert "clean cases without alarm" in capsys.readouterr().out


@needs_torch
def test_one_fault_is_planted_found_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--side", "both", "--only", "tanh GELU"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tanh GELU") == 2
    assert "faults found 2/2\nside named rightly 2/2\n" in shown
