"""Checks of the options that comparisons share."""

from collections.abc import Sequence

import jax.numpy as jnp

from flaxstab._checks import check
from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import Layout
from flaxstab.parity._torch_side import Rename

_LOW = ("float32", "bfloat16", "float16")


def check_options(layout: Layout, weights: str | None, rename: Rename | None) -> None:
    """Raises a ``ValueError`` unless each is one that :func:`compare` takes."""
    check(layout in ("image", None), "layout must be 'image' or None", layout=layout)
    rule = "weights must be 'torch', 'flax' or None"
    check(weights in ("torch", "flax", None), rule, weights=weights)
    check(
        rename is None or callable(rename),
        "rename must be a function of names",
        rename=rename,
        fix="Of a dict d pass lambda name: d.get(name, name).",
    )


def check_dtypes(dtypes: Sequence[DTypeLike]) -> None:
    """Raises a ``ValueError`` unless these are lower precisions."""
    rule = f"dtypes must be a sequence of {', '.join(_LOW)}"
    check(isinstance(dtypes, Sequence) and not isinstance(dtypes, str), rule, dtypes=dtypes)
    check(all(_name(kind) in _LOW for kind in dtypes), rule, dtypes=dtypes)


def _name(kind: DTypeLike) -> str:
    try:
        return jnp.dtype(kind).name
    except TypeError:
        return ""
