"""The options ``--parity-record`` and ``--parity-baseline``, run as in a user's suite."""

from pathlib import Path

import pytest

from flaxstab.parity import read_baseline
from parity_tests.test_pytest_plugin import pytest_output

SUITE = """
import numpy as np, torch
from flax import nnx
from flaxstab import functional, linear

FACTOR = {factor}
X = np.random.default_rng({seed}).normal(0.5, 1.0, (4, 3))

def both(x):
    return functional.gelu(x) * FACTOR

def torchs(x):
    return torch.nn.functional.gelu(x) * FACTOR

def test_pair(parity):
    parity.check(linear.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2), X)
    parity.check(both, torchs, X)

def test_wrong(parity):
    parity.check(functional.gelu, torch.relu, X)
"""


def suite(folder: Path, **values: float) -> Path:
    (folder / "test_mine.py").write_text(SUITE.format(**values))
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = suite(tmp_path_factory.mktemp("suite"), factor=1.0, seed=0)
    return folder, pytest_output(folder, "--parity-record", "before.parity")


def test_every_check_of_the_session_is_recorded_by_its_test(recorded: tuple[Path, str]) -> None:
    folder, said = recorded
    assert "3 comparisons recorded: before.parity" in said
    assert "1 failed, 1 passed" in said
    found = read_baseline(folder / "before.parity")
    name = "test_mine.py::test_pair"
    assert [*found.cases] == [name, f"{name} (2)", "test_mine.py::test_wrong"]
    assert [c.facts.passed for c in found.cases.values()] == [True, True, False]


def test_a_check_is_compared_with_its_record_from_stored_inputs(
    recorded: tuple[Path, str],
) -> None:
    # Other inputs, other weights; and both sides changed together, which no comparison of the two
    # can see: only the second check breaks what was right.
    folder = suite(recorded[0], factor=1.5, seed=1)
    said = pytest_output(folder, "--parity-baseline", "before.parity")
    assert "2 failed" in said
    assert "parity: not as in the baseline: " in said
    assert "breaks: of 3 cases 1 mathematics changed, 2 same" in said
    assert "test_pair (2)" in said
    assert "both" in said


def test_bad_options_are_refused_before_any_test(recorded: tuple[Path, str]) -> None:
    folder, _ = recorded
    (folder / "text.parity").write_text("no baseline")
    for options, words in (
        (["--parity-record", "none/a.parity"], "must name a file in a folder that exists"),
        (["--parity-baseline", "text.parity"], "text.parity must be a baseline"),
    ):
        said = pytest_output(folder, *options)
        assert words in said
        assert "passed" not in said


def test_xdist_is_refused_clearly(pytestconfig: pytest.Config) -> None:
    from flaxstab.pytest_plugin import _configure_baselines

    class Config:
        workerinput = "gw0"

        def getoption(self, name: str, default: object = None) -> object:
            return {"--parity-record": "a.parity", "--parity-baseline": None}.get(name, default)

    assert pytestconfig.getoption("--parity-record") is None
    with pytest.raises(pytest.UsageError, match="in one process, got pytest-xdist"):
        _configure_baselines(Config())
