"""``flaxstab parity run``: runs the parity tests, from a checkout or from an installed wheel."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flaxstab.cli._command import FAILED, PASSED, REFUSED, imports, refuse

if TYPE_CHECKING:
    from flaxstab.cli._command import Actions

NEEDED = ("pytest", "chex", "hypothesis", "jax", "flax.nnx", "optax")
# What pyproject.toml sets for a checkout, which a wheel does not have.
OPTIONS = (
    "--strict-markers", "--strict-config", "--doctest-modules", "-p", "no:cacheprovider",
    "-W", "error",
)  # fmt: skip
ENDS = {0: PASSED, 1: FAILED}


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    command = actions.add_parser(
        "run",
        help="run the parity tests on what is installed here",
        usage="flaxstab parity run [FILE ...] [PYTEST OPTION ...]",
        description="Runs the tests that compare every layer, optimizer and training run with"
        " PyTorch: those of the checkout, or those that were installed with flaxstab. What needs"
        " the checkout's own files, or PyTorch where there is none, is listed as not applicable."
        " Takes about 15 minutes on 2 cores with -n 2.",
        epilog="FILE: a file of parity_tests (test_norms.py, test_norms.py::NAME), default: all."
        " Everything else is passed on to pytest: -n 2, -k norms, -x ..."
        " Exit code: 0 all passed; 1 not so; 2 refused, or nothing was tested.",
    )
    command.set_defaults(run=run, passes_on=True)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    absent = [name for name in NEEDED if not imports(name)]
    if absent:
        return refuse(
            f"{', '.join(absent)} cannot be imported. Install them: pip install"
            " 'flaxstab[test]'; if they are installed, flaxstab env says what is wrong."
        )
    tests = _folder()
    if tests is None:
        return refuse("parity_tests is not installed beside flaxstab. Install flaxstab's wheel.")
    words = [_in_place(tests, word) for word in given.rest]
    if not any(tests == Path(_path(word)) or tests in Path(_path(word)).parents for word in words):
        words.append(str(tests))
    call = [sys.executable, "-m", "pytest", *_options(tests), *words]
    ended = subprocess.run(call, check=False, env=_environment(tests)).returncode  # noqa: S603
    return ENDS.get(ended, REFUSED)


def _folder() -> Path | None:
    """Returns where the tests are, without importing them."""
    spec = find_spec("parity_tests")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _options(tests: Path) -> Sequence[str]:
    """Returns pytest's options: the checkout's configuration, or the same without a file."""
    settings = tests.parent / "pyproject.toml"
    if settings.is_file():
        return ("-c", str(settings))
    # No file of the folder where the user happens to be decides how these tests run.
    return ("-c", os.devnull, "--rootdir", str(tests.parent), *OPTIONS)


def _path(word: str) -> str:
    return word.partition("::")[0]


def _in_place(tests: Path, word: str) -> str:
    """Returns the path of a file of the tests that is named by itself; other words as they are."""
    path, _, rest = word.partition("::")
    found = tests / path.removeprefix(f"{tests.name}/")
    if path.endswith(".py") and found.is_file():
        return f"{found}::{rest}" if rest else str(found)
    return word


def _environment(tests: Path) -> dict[str, str]:
    """Returns the environment, in which the tests can start Python with the same packages."""
    places = [str(tests.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
