"""The fixture ``parity``, run by pytest as a user's suite would, with README's own test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
if not README.is_file():
    pytest.skip("README.md is not part of the wheel", allow_module_level=True)

LINES = 24  # of one screen
OTHERS = """
import sys
import torch

def test_flax_momentum(parity):
    net = Net(nnx.Rngs(0), momentum=0.9)
    images = np.random.default_rng(0).normal(0.5, 1.0, (8, 16, 16, 3))
    parity.check(net, TorchNet(), images, layout="image")

def test_other_layers(parity):
    parity.check(Net(nnx.Rngs(0)), torch.nn.Linear(3, 10), np.ones((2, 3)))

def test_inside(parity):
    parity.check(Net(nnx.Rngs(0)), TorchNet(), np.ones((8, 16, 16, 4)), layout="image")

def test_returns_the_report(parity):
    report = parity.check(nnx.relu, torch.relu, np.linspace(-1, 1, 9), dtypes=())
    assert report.verdict == "agree"
"""


def blocks(marker: str) -> str:
    """Returns README's fenced block behind a marker."""
    (found,) = re.findall(rf"{re.escape(marker)}\n```\w*\n(.*?)```", README.read_text(), re.DOTALL)
    return found


def pytest_output(folder: Path, *arguments: str, **extra: str) -> str:
    """Returns what pytest prints in a folder of its own, without this suite's settings.

    Args:
      folder: holds the tests.
      *arguments: more options.
      **extra: environment variables.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTEST_XDIST_WORKER")}
    env["PYTHONPATH"] = os.pathsep.join([str(README.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options = {"cwd": folder, "env": {**env, **extra}, "capture_output": True, "text": True}
    run = subprocess.run([*command, "-q", *arguments], check=False, **options)  # noqa: S603
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("torch", reason="needs torch, which is not installed")
    folder = tmp_path_factory.mktemp("suite")
    (folder / "my_port.py").write_text("from parity_tests.support.my_port import *\n")
    (folder / "test_mine.py").write_text(blocks("<!-- port -->") + OTHERS)
    return pytest_output(folder)


def failure(output: str, test: str) -> list[str]:
    """Returns what pytest prints under a failing test's title."""
    (found,) = re.findall(rf"_+ {test} _+\n(.*?)\n(?:_+ test|=+ short)", output, re.DOTALL)
    return found.splitlines()


def test_readmes_test_has_10_lines_at_most_and_passes(output: str) -> None:
    lines = [line for line in blocks("<!-- port -->").splitlines() if line.strip()]
    assert len(lines) <= 10
    assert "test_port" not in re.sub(r"^test_mine.*$", "", output, flags=re.MULTILINE)
    assert "3 failed, 2 passed" in output, output


def test_a_failure_is_the_one_that_readme_shows(output: str) -> None:
    """Word for word but for the digits, which move with the machine."""
    shown = blocks("<!-- port fails -->").rstrip().splitlines()
    found = failure(output, "test_flax_momentum")

    def words(lines: list[str]) -> list[str]:
        return [re.sub(r"\d\.?\d*(e[+-]\d+)?(?= )", "#", line) for line in lines]

    assert words(found) == words(shown)


def test_a_failure_fits_one_screen_and_says_where_to_look(output: str) -> None:
    found = failure(output, "test_flax_momentum")
    assert len(found) <= LINES
    assert found[0].startswith("parity: semantics_differ: ")
    assert found[-1].startswith("  look at: the momentum of the statistics")
    assert "Traceback" not in output


def test_other_layers_are_named(output: str) -> None:
    found = "\n".join(failure(output, "test_other_layers"))
    assert found.startswith("parity: cannot compare: PyTorch's weights must fit the Flax model")
    assert "missing: conv.weight" in found


def test_a_model_that_cannot_run_is_named_with_the_place(output: str) -> None:
    (found,) = failure(output, "test_inside")
    assert found.startswith("parity: cannot compare: the Flax side must run on its inputs, got")
    assert "in conv (Conv, line" in found


def test_the_plugin_loads_neither_jax_nor_torch_before_use(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light(request):\n"
        "    assert request.config.pluginmanager.has_plugin('flaxstab.pytest_plugin')\n"
        "    assert not {'jax', 'flax', 'torch', 'numpy'} & set(sys.modules)\n"
        "def test_fixture(parity):\n"
        "    assert not {'jax', 'flax', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    # Alone: other plugins of this environment import JAX.
    loaded = ("-p", "flaxstab.pytest_plugin")
    assert "2 passed" in pytest_output(tmp_path, *loaded, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def test_without_torch_the_fixture_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "test_bare.py").write_text(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "def test_bare(parity):\n"
        "    parity.check(abs, abs)\n"
    )
    assert "the comparison needs torch: pip install 'flaxstab[torch]'" in pytest_output(tmp_path)
