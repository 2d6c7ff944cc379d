"""How each NNX layer type's variables are called and laid out in PyTorch: one table."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import attention, dropout, linear, norms
from flaxstab._checks import check
from flaxstab.blocks._residual import Add
from flaxstab.interop._entries import (
    BIAS,
    COUNT,
    EMBEDDING,
    FLIPPED,
    GAMMA,
    KERNEL,
    MATRIX,
    MEAN,
    MOVED,
    SCALE,
    SLOPE,
    TRANSPOSED,
    VAR,
    Arrays,
    Entry,
)
from flaxstab.interop._packed import (
    CELLS,
    attention_refusal,
    bidirectional,
    cell_refusal,
    is_bidirectional,
    is_recurrent,
    linear_general_refusal,
    packed_attention,
    recurrent,
    stock_attention,
)

Tensors = dict[str, np.ndarray]
ToTorch = Callable[[nnx.Module], Tensors]
ToFlax = Callable[[nnx.Module, Mapping[str, np.ndarray]], Tensors]


class Rule(NamedTuple):
    """Carries one layer across.

    Attributes:
      entries: from a layer to how its variables travel; those that it has not (``None``) do not
        count.
      ignored: tensors that torch's layer has and this one does without.
      owns: whether the layer's submodules are parts of it, carried by this rule alone.
      refusal: from a layer to the reason why torch has no such layer; '' if it has.
      applies: whether the rule is for this layer; otherwise the layer is a mere container.
      reads: whether the entries depend on the variables' values.
    """

    entries: Callable[..., tuple[Entry, ...]]
    ignored: tuple[str, ...] = ()
    owns: bool = False
    refusal: Callable[..., str] = lambda _: ""
    applies: Callable[..., bool] = lambda _: True
    reads: bool = False


def _fixed(*entries: Entry, ignored: tuple[str, ...] = ()) -> Rule:
    return Rule(lambda _: entries, ignored)


def _conv(module: linear.Conv | nnx.Conv) -> tuple[Entry, ...]:
    return (KERNEL._replace(rank=len(module.kernel_size) + 2), BIAS)


def _conv_transpose(module: linear.ConvTranspose) -> tuple[Entry, ...]:
    return (MOVED._replace(rank=len(module.kernel_size) + 2), BIAS)


def _stock_conv_transpose(module: nnx.ConvTranspose) -> tuple[Entry, ...]:
    kernel = TRANSPOSED if module.transpose_kernel else FLIPPED
    return (kernel._replace(rank=len(module.kernel_size) + 2), BIAS)


def _over_axes(*entries: Entry) -> Rule:
    """Returns the rule of a norm over the last axes, whose parameters have all of them."""

    def entries_of(norm: norms.LayerNorm | norms.RMSNorm) -> tuple[Entry, ...]:
        axes = len(norm.normalized_shape)
        return tuple(entry._replace(rank=axes, features=axes) for entry in entries)

    return Rule(entries_of)


def _of_features(*entries: Entry) -> tuple[Entry, ...]:
    return tuple(entry._replace(features=1) for entry in entries)


_DENSE = (*_of_features(MATRIX), BIAS)
_LINEAR = _fixed(*_DENSE)
_CONV = Rule(_conv)
_EMBED = _fixed(EMBEDDING)
_NORM = _fixed(SCALE, BIAS)
_BATCH = _of_features(SCALE, BIAS, MEAN, VAR)
_TRACKED = _fixed(*_BATCH, COUNT)
_UNCOUNTED = _fixed(*_BATCH, ignored=("num_batches_tracked",))
_CELL = Rule(lambda cell: CELLS[type(cell)], owns=True, refusal=cell_refusal)

RULES: dict[type[nnx.Module], Rule] = {
    linear.Linear: _LINEAR,
    linear.Conv: _CONV,
    linear.ConvTranspose: Rule(_conv_transpose),
    linear.Embed: _EMBED,
    norms.BatchNorm: _TRACKED,
    norms.GhostBatchNorm: _TRACKED,
    norms.InstanceNorm: _fixed(SCALE, BIAS, MEAN, VAR, COUNT),
    norms.FrozenBatchNorm: _UNCOUNTED,
    norms.LayerNorm: _over_axes(SCALE, BIAS),
    norms.RMSNorm: _over_axes(SCALE),
    norms.GroupNorm: _NORM,
    attention.MultiHeadAttention: Rule(packed_attention, owns=True),
    Add: _fixed(GAMMA),
    dropout.Dropout: _fixed(),
    dropout.ChannelDropout: _fixed(),
    dropout.AlphaDropout: _fixed(),
    dropout.DropPath: _fixed(),
    dropout.RecurrentDropout: _fixed(),
    dropout.RecurrentDropoutCell: _fixed(),
    nnx.Linear: _LINEAR,
    nnx.Conv: _CONV,
    nnx.ConvTranspose: Rule(_stock_conv_transpose),
    nnx.BatchNorm: _UNCOUNTED,
    nnx.LayerNorm: _fixed(*_of_features(SCALE, BIAS)),
    nnx.GroupNorm: _NORM,
    nnx.InstanceNorm: _NORM,
    nnx.RMSNorm: _fixed(*_of_features(SCALE)),
    nnx.Embed: _EMBED,
    nnx.PReLU: _fixed(SLOPE),
    nnx.Dropout: _fixed(),
    nnx.LinearGeneral: Rule(lambda _: _DENSE, refusal=linear_general_refusal),
    nnx.MultiHeadAttention: Rule(stock_attention, owns=True, refusal=attention_refusal),
    nnx.LSTMCell: _CELL,
    nnx.OptimizedLSTMCell: _CELL,
    nnx.SimpleCell: _CELL,
    nnx.GRUCell: _CELL,
    nnx.RNN: Rule(recurrent, owns=True, applies=is_recurrent),
    nnx.Bidirectional: Rule(bidirectional, owns=True, applies=is_bidirectional),
}


def rule_of(module: nnx.Module) -> Rule | None:
    """Returns the rule that carries a module, if there is one for it."""
    rule = RULES.get(type(module))
    return rule if rule is not None and rule.applies(module) else None


def register(module_type: type[nnx.Module], *, to_torch: ToTorch, to_flax: ToFlax) -> None:
    """Teaches :func:`state_dict` and :func:`load_state_dict` a module type of your own.

    Args:
      module_type: the type whose own variables the rule carries; its submodules are walked as
        usual.
      to_torch: from a module to its tensors: torch's name (without prefix) to array.
      to_flax: from a module and all those tensors to its variables' values: attribute to array.
        It must not change the module.

    Raises:
      ValueError: if the type has a rule already.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.gamma = nnx.Param(jnp.ones((2,)))
      >>> register(
      ...     Scale,
      ...     to_torch=lambda module: {"gain": module.gamma[...]},
      ...     to_flax=lambda module, tensors: {"gamma": tensors["gain"]},
      ... )
    """
    check(
        module_type not in RULES,
        "a module type is registered once",
        module_type=module_type.__name__,
    )
    RULES[module_type] = Rule(lambda m: (_registered(m, to_torch, to_flax),), reads=True)


def _registered(module: nnx.Module, to_torch: ToTorch, to_flax: ToFlax) -> Entry:
    """Returns one entry of all the variables that a registered rule carries."""
    tensors = to_torch(module)
    variables = tuple(to_flax(module, tensors))
    for name in variables:
        check(
            isinstance(vars(module).get(name), nnx.Variable),
            "a rule must give values for variables of the module",
            attribute=name,
            module_type=type(module).__name__,
        )

    def back(arrays: Arrays) -> Arrays:
        values = to_flax(module, dict(zip(tensors, arrays, strict=True)))
        return tuple(np.asarray(values[name]) for name in variables)

    def out(arrays: Arrays) -> Arrays:
        other = nnx.clone(module)
        for name, array in zip(variables, arrays, strict=True):
            setattr(other, name, type(vars(module)[name])(jnp.asarray(array)))
        return tuple(np.asarray(array) for array in to_torch(other).values())

    def gradient(arrays: Arrays) -> Arrays:
        shifts = out(tuple(np.zeros_like(array) for array in arrays))
        return tuple(a - b for a, b in zip(out(arrays), shifts, strict=True))

    words = f"by the rule of {type(module).__name__}"
    shapes = tuple(np.shape(array) for array in tensors.values())
    return Entry(variables, tuple(tensors), out, back, words, gradient=gradient, shapes=shapes)
