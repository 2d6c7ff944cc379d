"""PyTorch state_dicts in and out, by walking the model and its layer types."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from flaxstab._typing import Array
from flaxstab.interop._entries import Path, part, tensors_of
from flaxstab.interop._flattened import Flattened
from flaxstab.interop._matching import Rename, Spot, sort_out
from flaxstab.interop._report import LoadReport
from flaxstab.interop._stock import stock_warnings
from flaxstab.interop._walk import walk

_ALIGNMENT = 64  # bytes; at such an address JAX takes an array of NumPy's as it is
_ROWS = 8  # of a transposition at once: what they touch stays in the cache


def state_dict(model: nnx.Module, *, flattened: Flattened | None = None) -> dict[str, np.ndarray]:
    """Returns a model's parameters and statistics by PyTorch's names, in PyTorch's layouts.

    Each layer type has its rule; nothing is guessed from names or ranks. ``nnx.Sequential`` is
    transparent, as ``torch.nn.Sequential`` is. Stacks, those of :class:`flaxstab.models.Stack`
    and what ``nnx.vmap`` builds, come apart into their layers.

    Args:
      model: a module built of flaxstab's or stock NNX layers and registered types.
      flattened: which layers' inputs are images that were flattened, as for
        :func:`load_state_dict`.

    Returns:
      Arrays by name, sorted by module. A module that the model holds twice appears once, under
      its first name.

    Raises:
      ValueError: if a variable belongs to a module type without a rule, or a layer is one that
        PyTorch has not, or the order of a norm's axes must be told.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> {k: v.shape for k, v in state_dict(linear.Linear(2, 5, rngs=nnx.Rngs(0))).items()}
      {'weight': (5, 2), 'bias': (5,)}
    """
    return tensors_of(found.layer for found in walk(model, flattened) if not found.again)


def load_state_dict(
    model: nnx.Module,
    state_dict: Mapping[str, object],
    *,
    strict: bool = True,
    rename: Rename | None = None,
    flattened: Flattened | None = None,
) -> LoadReport:
    """Loads a PyTorch state_dict into a model, in place, all or nothing.

    Args:
      model: a module built of flaxstab's or stock NNX layers and registered types.
      state_dict: arrays or CPU tensors by PyTorch's names, in PyTorch's layouts. A layer that the
        model holds twice may come under either name or, with equal numbers, under both. Each
        layer of a stack has a name of its own.
      strict: whether every tensor and every variable must find its counterpart. Otherwise what
        fits is loaded and the report says what did not.
      rename: from a name in ``state_dict`` to the name in this model.
      flattened: for each linear layer (or norm) behind the flattening of an image, by its name in
        PyTorch, the image's shape ``(*space, C)``: PyTorch counts such features channels first,
        Flax channels last. Likewise the axes of a LayerNorm or RMSNorm over an image. Norms over
        several axes without an entry go as they are; where all axes have one size, so that no
        shape would show a wrong order, an entry is needed: ``None`` says that both orders agree.

    Returns:
      What became of every tensor and every variable.

    Raises:
      ValueError: if something does not fit under ``strict``, or a variable belongs to a module
        type without a rule, or a layer is one that PyTorch has not, or the order of a norm's axes
        must be told. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2 * 2 * 3, 5, rngs=nnx.Rngs(0))
      >>> tensors = state_dict(model, flattened={"": (2, 2, 3)})  # torch flattens (3, 2, 2)
      >>> print(load_state_dict(model, tensors, flattened={"": (2, 2, 3)}))
      2 tensors loaded
    """
    # The first names first: a tensor that is missing under all its names is missing there.
    found = sorted(walk(model, flattened), key=lambda walked: walked.again)
    loading = sort_out([walked.layer for walked in found], state_dict, rename)
    if strict:
        loading.require("Pass rename= for other names, or strict=False to load what fits.")
    variables = {path: v for walked in found for path, v in walked.variables.items()}
    _set_all(variables, _joined(loading.values, variables))
    report = loading.report
    return report._replace(warnings=stock_warnings(found, report))


def _joined(
    values: Mapping[Spot, np.ndarray], variables: Mapping[Path, nnx.Variable[Array]]
) -> dict[Path, Array]:
    """Returns the variables' new values, copied; of a stack what is not new stays."""
    parts: dict[Path, dict[tuple[int, ...], np.ndarray]] = {}
    for (path, index), array in values.items():
        parts.setdefault(path, {})[index] = array
    copies = []
    for path, by_index in parts.items():
        variable = variables[path]
        whole = _empty(variable.shape, variable.dtype)
        if sum(array.size for array in by_index.values()) < whole.size:
            whole[...] = np.asarray(variable[...])
        for index, array in by_index.items():
            _copy(part(whole, index), array)
        copies.append(whole)
    # JAX may share these copies' memory. The tensors' own would change under the model: torch
    # changes them in place (test_the_model_does_not_share_memory_with_the_state_dict).
    return dict(zip(parts, jax.device_put(copies), strict=True))


def _set_all(variables: Mapping[Path, nnx.Variable[Array]], new: Mapping[Path, Array]) -> None:
    """Gives variables new values; none, should one of them refuse its own."""
    old = {path: variables[path].get_raw_value() for path in new}
    try:
        for path, value in new.items():
            # Not variable[...] = value: that computes twice what it replaces.
            variables[path].set_value(_placed(value, old[path]))
    except BaseException:
        for path, value in old.items():
            variables[path].set_raw_value(value)
        raise


def _placed(new: Array, old: object) -> Array:
    """Returns an array on the devices of the one that it replaces."""
    sharding = old.sharding if isinstance(old, jax.Array) else None
    return new if sharding in {None, new.sharding} else jax.device_put(new, sharding)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array of any numbers at an address that JAX need not copy from."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array; a transposed one in strips, several times as fast as in one go."""
    rows = target.shape[-1] if target.ndim > 1 and not source.flags.c_contiguous else 0
    for start in range(0, rows, _ROWS):
        target[..., start : start + _ROWS] = source[..., start : start + _ROWS]
    if not rows:
        target[...] = source
