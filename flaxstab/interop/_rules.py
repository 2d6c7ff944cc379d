"""How each layer type's variables are called and laid out in PyTorch: one table."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from flaxstab import dropout, linear, norms
from flaxstab._checks import check

Tensors = dict[str, np.ndarray]
ToTorch = Callable[[nnx.Module], Tensors]
ToFlax = Callable[[nnx.Module, Mapping[str, np.ndarray]], Tensors]


class Rule(NamedTuple):
    """Carries one layer across.

    Attributes:
      to_torch: from a layer to its tensors, by torch's name and in torch's layout.
      to_flax: from a layer and those tensors to its variables' new values, by attribute.
      ignored: tensors that torch's layer has and this one does without.
    """

    to_torch: ToTorch
    to_flax: ToFlax
    ignored: tuple[str, ...] = ()


class Entry(NamedTuple):
    """One variable of a layer and its tensor in torch.

    Attributes:
      variable: the attribute's name in Flax.
      tensor: the tensor's name in torch.
      to_torch: from Flax's layout to torch's.
      to_flax: back.
    """

    variable: str
    tensor: str
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_flax: Callable[[np.ndarray], np.ndarray] = np.asarray


def value_of(variable: nnx.Variable[object]) -> np.ndarray:
    """Returns a variable's value as a NumPy array."""
    return np.asarray(variable[...])


def _table_rule(*entries: Entry, ignored: tuple[str, ...] = ()) -> Rule:
    def to_torch(module: nnx.Module) -> Tensors:
        found = ((e, vars(module)[e.variable]) for e in entries)
        return {e.tensor: e.to_torch(value_of(v)) for e, v in found if v is not None}

    def to_flax(module: nnx.Module, tensors: Mapping[str, np.ndarray]) -> Tensors:
        present = (e for e in entries if vars(module)[e.variable] is not None)
        return {e.variable: e.to_flax(tensors[e.tensor]) for e in present if e.tensor in tensors}

    return Rule(to_torch, to_flax, ignored)


def _kernel_to_torch(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-1, -2), (0, 1))  # (*window, in, out) -> (out, in, *window)


def _kernel_to_flax(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(weight, (0, 1), (-1, -2))


_KERNEL = Entry("kernel", "weight", _kernel_to_torch, _kernel_to_flax)
_BIAS = Entry("bias", "bias")
_SCALE = Entry("scale", "weight")
_MEAN = Entry("mean", "running_mean")
_VAR = Entry("var", "running_var")
_COUNT = Entry(
    "count",
    "num_batches_tracked",
    lambda count: np.asarray(count, np.int64),
    lambda count: np.asarray(count, np.int32),
)

_WEIGHTED = _table_rule(_KERNEL, _BIAS)
_NORM = _table_rule(_SCALE, _BIAS)
_TRACKED = _table_rule(_SCALE, _BIAS, _MEAN, _VAR, _COUNT)

RULES: dict[type[nnx.Module], Rule] = {
    linear.Linear: _WEIGHTED,
    linear.Conv: _WEIGHTED,
    norms.BatchNorm: _TRACKED,
    norms.GhostBatchNorm: _TRACKED,
    norms.InstanceNorm: _TRACKED,
    norms.LayerNorm: _NORM,
    norms.GroupNorm: _NORM,
    dropout.Dropout: _table_rule(),
    nnx.Linear: _WEIGHTED,
    nnx.Conv: _WEIGHTED,
    nnx.BatchNorm: _table_rule(_SCALE, _BIAS, _MEAN, _VAR, ignored=("num_batches_tracked",)),
    nnx.LayerNorm: _NORM,
    nnx.GroupNorm: _NORM,
    nnx.InstanceNorm: _NORM,
    nnx.RMSNorm: _table_rule(_SCALE),
    nnx.Embed: _table_rule(Entry("embedding", "weight")),
    nnx.Dropout: _table_rule(),
}


def register(module_type: type[nnx.Module], *, to_torch: ToTorch, to_flax: ToFlax) -> None:
    """Teaches :func:`state_dict` and :func:`load_state_dict` a module type of your own.

    Args:
      module_type: the type whose own variables the rule carries; its submodules are walked as
        usual.
      to_torch: from a module to its tensors: torch's name (without prefix) to array.
      to_flax: from a module and those tensors to its variables' values: attribute to array. It
        must not change the module.

    Raises:
      ValueError: if the type has a rule already.
    """
    check(
        module_type not in RULES,
        "a module type is registered once",
        module_type=module_type.__name__,
    )
    RULES[module_type] = Rule(to_torch, to_flax)
