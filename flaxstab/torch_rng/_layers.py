"""What each layer type of PyTorch draws when it is built, and in which order: one table."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from flax import nnx

from flaxstab import attention, initializers, interop, linear
from flaxstab._checks import check
from flaxstab.blocks._residual import Add
from flaxstab.interop._walk import walk
from flaxstab.norms._kinds import NORMS
from flaxstab.torch_rng._generator import Generator

Tensors: TypeAlias = Mapping[str, np.ndarray]
Draw: TypeAlias = Callable[[nnx.Module, Tensors, Generator], Tensors]
"""From a layer, its tensors by PyTorch's names in PyTorch's layouts, and the generator to those
tensors that it draws or sets."""


def _affine(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    """Linear and all convolutions: Kaiming's uniform law with a = √5, then the bias."""
    del layer
    weight, new = tensors["weight"], {}
    new["weight"] = generator.kaiming_uniform(weight.shape, math.sqrt(5.0), dtype=weight.dtype)
    if "bias" in tensors:
        bias, fan_in = tensors["bias"], math.prod(weight.shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        new["bias"] = generator.uniform(bias.shape, -bound, bound, bias.dtype)
    return new


def _embedding(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    weight = generator.normal(tensors["weight"].shape, dtype=tensors["weight"].dtype)
    if isinstance(layer, linear.Embed) and layer.padding_idx is not None:
        weight[layer.padding_idx] = 0
    return {"weight": weight}


def _attention(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    """The output projection as a Linear, then the input projections; all biases 0."""
    prefix = "out_proj."
    inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    new = {prefix + name: t for name, t in _affine(layer, inner, generator).items()}
    packed = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    for name in (name for name in packed if name in tensors):
        new[name] = generator.xavier_uniform(tensors[name].shape, dtype=tensors[name].dtype)
    zeros = (name for name in ("in_proj_bias", "out_proj.bias") if name in tensors)
    new |= {name: np.zeros_like(tensors[name]) for name in zeros}
    for name in (name for name in ("bias_k", "bias_v") if name in tensors):
        new[name] = generator.xavier_normal(tensors[name].shape, dtype=tensors[name].dtype)
    return new


def _recurrent(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    """Every weight and bias of a recurrent cell from one uniform law."""
    del layer
    bound = 1 / math.sqrt(tensors["weight_hh"].shape[1])
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {
        name: generator.uniform(tensors[name].shape, -bound, bound, tensors[name].dtype)
        for name in names
    }


def _slope(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    del layer, generator
    return {"weight": np.full_like(tensors["weight"], 0.25)}


DRAWS: dict[type[nnx.Module], Draw] = {
    linear.Linear: _affine,
    linear.Conv: _affine,
    linear.ConvTranspose: _affine,
    linear.Embed: _embedding,
    attention.MultiHeadAttention: _attention,
    nnx.Linear: _affine,
    nnx.LinearGeneral: _affine,
    nnx.Conv: _affine,
    nnx.ConvTranspose: _affine,
    nnx.Embed: _embedding,
    nnx.MultiHeadAttention: _attention,
    nnx.LSTMCell: _recurrent,
    nnx.OptimizedLSTMCell: _recurrent,
    nnx.SimpleCell: _recurrent,
    nnx.PReLU: _slope,
}

ATTENTIONS = (attention.MultiHeadAttention, nnx.MultiHeadAttention)

OWNERS: frozenset[type[nnx.Module]] = frozenset(
    {*ATTENTIONS, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell}
)
"""Layers whose submodules are parts of them and draw nothing for themselves."""

SILENT: tuple[type[nnx.Module], ...] = (*NORMS, Add)
"""Layers with arrays whose counterparts draw nothing: they stay as they are."""


def register(module_type: type[nnx.Module], draw: Draw) -> None:
    """Teaches :func:`seed_parameters` what the counterpart of a module type draws.

    Args:
      module_type: a type with a rule in :func:`flaxstab.interop.register`.
      draw: from a module, its tensors (arrays by PyTorch's names, in PyTorch's layouts) and the
        generator to the new tensors, drawn in PyTorch's order. It is called when the module's
        constructor returns, after the draws of its submodules.

    Raises:
      ValueError: if the type has a rule already.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import interop, torch_rng
      >>> class Token(nnx.Module):
      ...     def __init__(self):
      ...         self.token = nnx.Param(jnp.zeros((1, 1, 4)))
      >>> interop.register(
      ...     Token,
      ...     to_torch=lambda module: {"token": module.token[...]},
      ...     to_flax=lambda module, tensors: {"token": tensors["token"]},
      ... )
      >>> torch_rng.register(
      ...     Token,
      ...     lambda module, tensors, generator: {
      ...         "token": generator.trunc_normal(tensors["token"].shape, std=0.02)
      ...     },
      ... )
      >>> torch_rng.seed_parameters(Token, 0).token[...].round(3)
      Array([[[ 0.031, -0.006, -0.044,  0.011]]], dtype=float32)
    """
    known = module_type in DRAWS or module_type in SILENT
    check(not known, "a module type is registered once", module_type=module_type.__name__)
    DRAWS[module_type] = draw


def layer_rule(nonlin: str = "relu", leaky_slope: float = 0.01) -> Draw:
    """Returns document 2's ``init_layer`` as a rule for ``seed_parameters(..., then=...)``.

    As there, it reaches linear layers, convolutions over two axes and the output projection of
    attention: Xavier's uniform law for tanh, sigmoid and linear, else Kaiming's normal one; bias 0.

    Args:
      nonlin: the activation behind the layers.
      leaky_slope: the slope of ``'leaky_relu'``.
    """
    affine = (linear.Linear, linear.Conv, nnx.Linear, nnx.LinearGeneral, nnx.Conv)

    def draw(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
        prefix = "out_proj." if isinstance(layer, ATTENTIONS) else ""
        weight = tensors.get(f"{prefix}weight")
        reached = isinstance(layer, affine) or prefix
        if weight is None or not reached or weight.ndim not in (2, 4):
            return {}
        shape, dtype = weight.shape, weight.dtype
        if nonlin in initializers.XAVIER:
            new = generator.xavier_uniform(shape, dtype=dtype)
        elif nonlin == "leaky_relu":
            new = generator.kaiming_normal(shape, leaky_slope, dtype=dtype)
        else:
            new = generator.kaiming_normal(shape, nonlinearity="relu", dtype=dtype)
        bias = tensors.get(f"{prefix}bias")
        zero = {} if bias is None else {f"{prefix}bias": np.zeros_like(bias)}
        return {f"{prefix}weight": new} | zero

    return draw


def redrawn(layer: nnx.Module, draw: Draw, generator: Generator) -> None:
    """Gives a layer, in place, the tensors that a rule draws.

    Raises:
      ValueError: if the rule returns anything but tensors of the layer, in their shapes, or the
        layer is a stack of layers.
    """
    tensors = interop.state_dict(layer)
    check(
        not any(found.layer.at for found in walk(layer)),
        "a layer must hold variables of its own",
        fix="nnx.vmap or nnx.scan stacks them: seed one layer each, then stack these, as "
        "flaxstab.models.stacked does.",
        layer=type(layer).__name__,
    )
    new: object = draw(layer, tensors, generator)
    kind = type(layer).__name__
    if not isinstance(new, Mapping):
        given = type(new).__name__
        raise ValueError(
            f"a rule must return tensors by name, {{}} for none, got {given} of {kind}."
        )
    unknown = sorted(set(new) - set(tensors))
    rule = f"a rule must draw tensors of the layer: {', '.join(tensors) or 'it has none'}"
    check(not unknown, rule, drawn=unknown, layer=kind)
    for name, tensor in new.items():
        drawn, shape = np.shape(tensor), tensors[name].shape
        check(
            drawn == shape, f"a rule must draw {name} in the shape {shape}", drawn=drawn, layer=kind
        )
    interop.load_state_dict(layer, {**tensors, **new})


def draws_numbers(layer: nnx.Module) -> bool:
    """Whether the counterpart of a layer draws from the stream when it is built."""
    return type(layer) in DRAWS and type(layer) is not nnx.PReLU


def is_container(module: nnx.Module) -> bool:
    """Whether a module is nothing to PyTorch but what it holds.

    Stock modules beyond these do something with the layers that they hold (``nnx.GRUCell``,
    ``nnx.SpectralNorm``), and so do subclasses of layers: their counterparts may draw otherwise.
    """
    stock = [t for t in type(module).__mro__ if t.__module__.startswith("flax.nnx.nn.")]
    return all(t in (nnx.RNN, nnx.Bidirectional, nnx.RNNCellBase) for t in stock)
