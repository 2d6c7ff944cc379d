"""Settings of every parity test: eight CPU devices, full precision, no implicit promotion."""

import atexit
import os
import shutil
import tempfile

# Equal programs are compiled once, also in the processes that tests start: a quarter of the time.
# One folder for each worker, since JAX does not write its files in one piece.
_compiled = tempfile.mkdtemp(prefix="flaxstab-tests-")
atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

from parity_tests.support.absent import (
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)
from parity_tests.support.random_checks import budget

__all__ = [
    "budget",
    "pytest_make_collect_report",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
]
