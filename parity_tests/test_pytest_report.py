"""``--parity-report DIR``: every comparison of a session, also under pytest-xdist."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxstab import parity

ROOT = Path(__file__).parents[1]
SUITE = """
import numpy as np
import pytest
import torch
from flax import nnx

X = np.linspace(-2, 2, 5)

def test_agrees(parity):
    parity.check(nnx.relu, torch.relu, X, dtypes=())

@pytest.mark.parametrize("odd", ["a/b [é]"])
def test_differs(parity, odd):
    parity.check(nnx.gelu, torch.nn.functional.gelu, X, dtypes=())

def test_twice(parity):
    for _ in range(2):
        parity.check(nnx.relu, torch.relu, X, dtypes=())

def test_refused(parity):
    parity.check(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(4, 2), X)

def test_compares_nothing():
    pass
"""
CASES = {
    "test_mine.py::test_agrees": "agree",
    "test_mine.py::test_differs[a/b [\\xe9]]": "semantics_differ",
    "test_mine.py::test_twice": "agree",
    "test_mine.py::test_twice (2)": "agree",
    "test_mine.py::test_refused": "not compared",
}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest in a folder of its own, with no plugins but those named."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_XDIST_WORKER")}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "flaxstab.pytest_plugin", *arguments]
    return subprocess.run(  # noqa: S603
        command, check=False, cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xdist")
    (folder / "test_mine.py").write_text(SUITE)
    found = run(folder, "--parity-report", "new/reports", "-p", "xdist", "-n", "1")
    (folder / "output").write_text(found.stdout + found.stderr)
    return folder


def test_without_xdist_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(SUITE)
    found = run(tmp_path, "--parity-report", ".", "-k", "twice")
    assert "all 2 comparisons pass: see parity.html" in found.stdout, found.stdout
    names = [case.name for case in parity.read_session(tmp_path / "parity.json").cases]
    assert names == ["test_mine.py::test_twice", "test_mine.py::test_twice (2)"]


def test_every_comparison_is_written_the_gravest_first(session: Path) -> None:
    output = (session / "output").read_text()
    assert "2 failed, 3 passed" in output, output
    written = parity.read_session(session / "new/reports/parity.json")
    assert {case.name: case.verdict for case in written.cases} == CASES
    names = [case.name for case in written.sorted()]
    assert [name.split("::")[1].split("[")[0] for name in names[:2]] == [
        "test_refused",
        "test_differs",
    ]
    page = (session / "new/reports/parity.html").read_text()
    assert "2 of 5 comparisons fail" in page
    assert page.index("test_mine.py::test_refused") < page.index("test_mine.py::test_agrees")
    assert "2 of 5 comparisons fail: see new/reports/parity.html" in output


def test_a_failure_has_its_script_there(session: Path) -> None:
    (script,) = (session / "new/reports").glob("*.py")
    assert script.name.startswith("test_mine_py_test_differs")
    assert "torch.nn.functional.gelu" in script.read_text()
    (case,) = [c for c in parity.read_session(session / "new/reports/parity.json").cases
               if c.verdict == "semantics_differ"]  # fmt: skip
    assert script.name in case.reproducer
    assert (
        "  alone: output in float64 with (1,): nnx.gelu beside" in (session / "output").read_text()
    )


def test_a_session_without_comparisons_replaces_an_old_report(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").write_text(
        "import sys\n"
        "def test_none(): assert not {'jax', 'flax', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    (tmp_path / "parity.html").write_text("old")
    found = run(tmp_path, "--parity-report", ".")
    assert found.returncode == 0, found.stdout
    assert "nothing was compared" in (tmp_path / "parity.html").read_text()
    assert parity.read_session(tmp_path / "parity.json").cases == ()


def test_a_folder_that_cannot_be_is_refused_before_any_test(tmp_path: Path) -> None:
    (tmp_path / "test_none.py").write_text("def test_none(): pass\n")
    (tmp_path / "file").write_text("")
    found = run(tmp_path, "--parity-report", "file")
    assert found.returncode == 4
    assert (
        "--parity-report must name a folder that exists or can be made, got 'file'" in found.stderr
    )
    assert "passed" not in found.stdout
