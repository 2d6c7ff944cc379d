"""What a function keeps for its backward pass: its arguments, and what is too dear to repeat."""

from collections.abc import Callable
from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from flaxstab._dtypes import cast
from flaxstab._typing import Array, DTypeLike

_KEPT = "flaxstab.kept"

recomputed = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
"""Makes a function keep only its arguments for the backward pass, which runs it again.

What passed through :func:`remembered` inside is kept as well.
"""


def remembered(array: Array) -> Array:
    """Marks an array that is small, or was exchanged between devices, as not to compute again."""
    return checkpoint_name(array, _KEPT)


def with_parameters(
    function: Callable[..., Array], x: Array, *parameters: Array | None, dtype: DTypeLike
) -> Array:
    """Returns ``function(x, *parameters)`` with the parameters in another dtype.

    The backward pass casts them again: a copy of every kernel in 16 bits would be half as large as
    the model (``test_no_copy_of_a_kernel_is_kept``).

    Args:
      function: what to compute.
      x: an input.
      *parameters: arrays that live anyway, in their own dtype; ``None`` stays ``None``.
      dtype: the dtype in which ``function`` gets them.
    """

    def run(x: Array, *own: Array | None) -> Array:
        return function(x, *(cast(parameter, dtype) for parameter in own))

    same = all(parameter is None or parameter.dtype == dtype for parameter in parameters)
    return run(x, *parameters) if same else recomputed(run)(x, *parameters)
