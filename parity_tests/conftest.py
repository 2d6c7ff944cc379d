"""Settings of every parity test: eight CPU devices, full precision, no implicit promotion."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

from parity_tests.support.random_checks import budget

__all__ = ["budget"]
