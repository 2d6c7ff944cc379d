"""One description of the machine, the packages and the settings, for reports and baselines."""

import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from flaxstab import __version__
from flaxstab._environment._versions import normal

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "torch", "numpy", "ml_dtypes", "jaxtyping",
    "orbax-checkpoint",
)  # fmt: skip
PLUGINS = ("jax-cuda", "jax-rocm", "jax-metal", "libtpu", "triton", "nvidia-cudnn")
SETTINGS = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE",
    "PYTHONHASHSEED", "TF_CUDNN_DETERMINISTIC", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "XLA_FLAGS",
)  # fmt: skip
FAMILIES = ("FLAX_", "JAX_", "NNX_", "XLA_PYTHON_")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE")


def describe(devices: bool = False) -> dict[str, object]:
    """Describes the environment in what JSON can hold.

    Args:
      devices: also import the frameworks, list their devices and measure how precise their products
        are. Takes seconds; without it nothing is imported.

    Returns:
      ``packages`` (name: version, ``None`` if absent), ``python``, ``platform``, ``settings`` (the
      environment variables that change results) and, with ``devices``, ``imports`` (name: why it
      cannot be imported, '' if it can), ``jax`` and ``torch`` (their devices, flags and measured
      precision; ``{}`` where they cannot be imported).

    Example:
      >>> sorted(describe())
      ['packages', 'platform', 'python', 'settings']
    """
    found: dict[str, object] = {
        "packages": packages(),
        "python": {"version": platform.python_version(), "build": platform.python_implementation()},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
        },
        "settings": settings(),
    }
    if devices:
        from flaxstab._environment._devices import probe

        found |= probe()
    return found


def tracked(pins: Mapping[str, str]) -> dict[str, str]:
    """Returns versions by the names that :func:`packages` has for their packages.

    Args:
      pins: versions by names as packaging spells them, of ``parse_pins``.

    Raises:
      ValueError: if one is of another package: nothing is known or recorded of it.

    Example:
      >>> tracked({"ml-dtypes": "0.5.1"})
      {'ml_dtypes': '0.5.1'}
    """
    spelled = {normal(name): name for name in packages()}
    other = [name for name in pins if name not in spelled]
    if other:
        raise ValueError(
            f"versions must be of packages that results depend on ({', '.join(PACKAGES)}),"
            f" got {other[0]!r}."
        )
    return {spelled[name]: version for name, version in pins.items()}


def packages() -> dict[str, str | None]:
    """Returns the versions of the packages that results depend on; ``None`` for an absent one."""
    versions: dict[str, str | None] = {"flaxstab": __version__}
    versions |= {name: version_of(name) for name in PACKAGES}
    for found in metadata.distributions():
        name = str(found.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(PLUGINS):
            versions[name] = found.version
    return versions


def version_of(name: str) -> str | None:
    """Returns an installed package's version without importing it; ``None`` if it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def settings() -> dict[str, str]:
    """Returns the environment variables that are set and may change results."""
    chosen = (*SETTINGS, *THREADS)
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in chosen or name.startswith(FAMILIES)
    }


def _cpu() -> str:
    """Returns the processor's name as the system gives it."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
