"""Inputs that can expose a fault: fixed seeds, with offset and scale."""

import numpy as np


def values(*shape: int, seed: int = 0, offset: float = 3.0, scale: float = 2.0) -> np.ndarray:
    """Returns float64 normal values; by default neither centred nor of unit variance."""
    return np.random.default_rng(seed).normal(offset, scale, shape)
