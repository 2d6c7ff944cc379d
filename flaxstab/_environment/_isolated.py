"""An environment beside the current one: the same packages, but for some versions."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import flaxstab
from flaxstab._environment._versions import normal

CORE = ("jax", "flax", "optax", "numpy", "jaxtyping", "ml-dtypes", "rich")
FRAMEWORKS = ("jax", "flax", "optax", "numpy", "torch")
# What a release of the first brings with it, in a version of its own choosing.
COMPANIONS = {"jax": ("jaxlib", "jax-cuda", "libtpu"), "torch": ("nvidia-", "triton", "cuda-")}
CUDA = ("cuda12", "cuda13")
SOURCES = ("flaxstab", "torch_ref", "parity_tests")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[[Sequence[str]], Ended]


class InstallError(Exception):
    """The environment could not be made; the message says why."""


def installed() -> dict[str, str]:
    """Returns the versions of all packages here, but for those from a folder or an address."""
    found = {}
    for package in metadata.distributions():
        name = normal(str(package.metadata["Name"] or ""))
        if name and not package.read_text("direct_url.json"):
            found[name] = package.version
    return found


def requirements(pins: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Returns what to install: what flaxstab needs, with the wanted versions.

    PyTorch is installed only where it is to change: what it computed here is recorded.

    Args:
      pins: wanted versions by name; '' for the newest.
      here: versions of the current environment.
    """
    extra = next((f"[{name}]" for name in CUDA if f"jax-{name}-plugin" in here), "")
    names = dict.fromkeys((*CORE, *pins))
    return [
        f"{name}{extra if name == 'jax' else ''}" + (f"=={pins[name]}" if pins.get(name) else "")
        for name in names
    ]


def attempts(pins: Mapping[str, str], here: Mapping[str, str]) -> list[list[str]]:
    """Returns constraints to try in turn: every version as it is now, the frameworks', none."""
    companions = tuple(name for pin in pins for name in COMPANIONS.get(pin, ()))
    kept = {
        name: version
        for name, version in here.items()
        if name not in pins and not name.startswith(companions)
    }
    public = {name: version.partition("+")[0] for name, version in kept.items()}
    frameworks = {name: version for name, version in public.items() if name in FRAMEWORKS}
    return [
        [f"{name}=={version}" for name, version in sorted(chosen.items())]
        for chosen in (public, frameworks, {})
    ]


def build(
    folder: Path, pins: Mapping[str, str], run: Run, *, python: str = "", here: Mapping[str, str]
) -> Path:
    """Makes a virtual environment in a folder, with flaxstab's own files in it.

    Args:
      folder: where; it must not exist.
      pins: wanted versions by name; '' for the newest.
      run: runs a command.
      python: the interpreter; '' is this one.
      here: versions of the current environment, kept as far as they go together with ``pins``.

    Returns:
      The new environment's interpreter.

    Raises:
      InstallError: if the environment cannot be made or the versions cannot be installed.
    """
    _done(run([python or sys.executable, "-m", "venv", str(folder)]), "cannot make an environment")
    new = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = requirements(pins, here)
    pip = [str(new), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    limits = folder / "constraints.txt"
    for constraints in attempts(pins, here):
        limits.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        ended = run([*pip, "-c", str(limits), *wanted])
        if ended.code == 0:
            break
    _done(ended, "cannot be installed")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = _done(run([str(new), "-I", "-c", where]), "its Python does not start").out.strip()
    for name in SOURCES:
        source = Path(flaxstab.__file__).parents[1] / name
        if source.is_dir():
            shutil.copytree(source, Path(site) / name, ignore=IGNORED)
    return new


def _done(ended: Ended, otherwise: str) -> Ended:
    if ended.code:
        raise InstallError(f"{otherwise}: {_reason(ended)}")
    return ended


def _reason(ended: Ended) -> str:
    """Returns what a command says about its failure, in one line."""
    lines = [line.strip() for line in f"{ended.out}\n{ended.err}".splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    words = " ".join(errors) or " ".join(lines[-3:]) or f"exit code {ended.code}"
    if "different python version" in words:
        words = words.rpartition("ERROR: ")[2]
        words += " (Some versions need another Python: give it with --python.)"
    return words
