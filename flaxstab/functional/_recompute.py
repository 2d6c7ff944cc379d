"""What a function keeps for its backward pass: its arguments, and what is too dear to repeat."""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from flaxstab._typing import Array

_KEPT = "flaxstab.kept"

recomputed = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
"""Makes a function keep only its arguments for the backward pass, which runs it again.

What passed through :func:`remembered` inside is kept as well.
"""


def remembered(array: Array) -> Array:
    """Marks an array that is small, or was exchanged between devices, as not to compute again."""
    return checkpoint_name(array, _KEPT)
