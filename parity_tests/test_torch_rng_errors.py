"""What ``torch_rng.Generator`` refuses, and in which words."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from flaxstab.torch_rng import Generator

BAD = {
    "seed": (lambda _: Generator(1.5), r"seed must be an integer in \[-2\*\*63, 2\*\*64"),
    "seed too big": (lambda _: Generator(2**64), "seed must be an integer"),
    "seed too small": (
        lambda _: Generator(-(2**63) - 1),
        "got seed=-9223372036854775809",
    ),
    "seed bool": (lambda _: Generator(True), "seed must be an integer"),
    "shape": (lambda g: g.uniform((2, -1)), "shape must be an integer or integers"),
    "shape float": (lambda g: g.normal((2.0,)), "shape must be an integer or integers"),
    "dtype": (lambda g: g.normal(3, dtype=np.int32), "got dtype='int32'"),
    "low above high": (lambda g: g.uniform(3, 1.0, 0.0), "low must not be above high"),
    "high infinite": (
        lambda g: g.uniform(3, 0.0, math.inf),
        r"low and high must lie in \[-3.403e\+38, ",
    ),
    "low nan": (lambda g: g.uniform(3, math.nan), "low and high must lie in"),
    "high of float16": (
        lambda g: g.uniform(3, 0.0, 1e5, np.float16),
        r"high must lie in \[-6.55e\+04, ",
    ),
    "range": (
        lambda g: g.uniform(3, -4e4, 4e4, np.float16),
        r"high - low must not be above 6.55e\+04",
    ),
    "mean": (lambda g: g.normal(3, math.nan), "mean must lie in"),
    "mean of float64": (
        lambda g: g.normal(3, 1e301, dtype=np.float64),
        r"mean must lie in \[-1.046e\+298, ",
    ),
    "std": (lambda g: g.normal(3, 0.0, -1.0), r"std must lie in \[0, 3.403e\+38\], got std=-1.0"),
    "std nan": (lambda g: g.normal(3, 0.0, math.nan), "std must lie in"),
    "truncated std": (lambda g: g.trunc_normal(3, 0.0, 0.0), "std must be positive and finite"),
    "bounds": (lambda g: g.trunc_normal(3, a=2.0, b=-2.0), "a must be below b"),
    "tail bounds": (lambda g: g.trunc_normal(3, a=3.0, b=math.inf), "low and high must lie in"),
    "stream": (lambda g: g.trunc_normal(3, stream="old"), "got stream='old'"),
    "p": (lambda g: g.bernoulli(3, 1.5), r"p must lie in \[0, 1\], got p=1.5"),
    "p nan": (lambda g: g.bernoulli(3, math.nan), "p must lie in"),
    "p of each": (lambda g: g.bernoulli(2, np.array([0.1, 0.2])), "p must be one number"),
    "dropped": (lambda g: g.dropout_mask(3, -0.1), "p must lie in"),
    "n": (lambda g: g.randperm(-1), r"n must be an integer in \[0, 214748364"),
    "n too big": (lambda g: g.randperm(2**32), "n must be an integer in"),
}


@pytest.mark.parametrize(("draw", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(draw: Callable[[Generator], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(Generator(0))
