"""Draws the variables of one layer anew."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab import initializers
from flaxstab._checks import check
from flaxstab._typing import Array, Initializer, Shape
from flaxstab.linear import Conv, ConvTranspose, Embed, Linear
from flaxstab.linear._base import check_rngs


class _Held(NamedTuple):
    """How one layer's variable is drawn, and in which shape the layer holds it."""

    drawn: Shape
    held: Shape


def _linear(layer: Linear | nnx.Linear) -> dict[str, Shape]:
    return {"kernel": (layer.in_features, layer.out_features), "bias": (layer.out_features,)}


def _conv(layer: Conv) -> dict[str, Shape]:
    channels = (layer.in_channels // layer.groups, layer.out_channels)
    return {"kernel": (*layer.kernel_size, *channels), "bias": (layer.out_channels,)}


def _conv_transpose(layer: ConvTranspose) -> dict[str, Shape]:
    channels = (layer.in_channels, layer.out_channels // layer.groups)
    return {"kernel": (*layer.kernel_size, *channels), "bias": (layer.out_channels,)}


def _stock_conv(layer: nnx.Conv | nnx.ConvTranspose) -> dict[str, Shape]:
    return {"kernel": layer.kernel_shape, "bias": (layer.out_features,)}


def _linear_general(layer: nnx.LinearGeneral) -> dict[str, Shape]:
    # Entries of batch_axis are layers side by side: leading axes, like those of a stack.
    return {"kernel": (*layer.in_features, *layer.out_features), "bias": layer.out_features}


def _embed(layer: Embed) -> dict[str, Shape]:
    return {"embedding": (layer.num_embeddings, layer.embedding_dim)}


def _stock_embed(layer: nnx.Embed) -> dict[str, Shape]:
    return {"embedding": (layer.num_embeddings, layer.features)}


_SHAPES: dict[type[nnx.Module], Callable[..., dict[str, Shape]]] = {
    Linear: _linear,
    Conv: _conv,
    ConvTranspose: _conv_transpose,
    Embed: _embed,
    nnx.Linear: _linear,
    nnx.Conv: _stock_conv,
    nnx.ConvTranspose: _stock_conv,
    nnx.LinearGeneral: _linear_general,
    nnx.Embed: _stock_embed,
}


def redraw(module: nnx.Module, name: str, init: Initializer, *, rngs: nnx.Rngs) -> None:
    """Draws one variable of a layer anew, in place: for rules of your own.

    Where ``nnx.vmap`` or ``nnx.scan`` has stacked layers, each of them gets a draw of its own, with
    the fan of the single layer; ``nnx.LinearGeneral`` is drawn as the matrix that it is. Stack on
    leading axes: another is refused where the shape shows it, but three ``Linear(3, 3)`` stacked
    with ``out_axes=1`` have the shape of three that are stacked in front, and are drawn as those.

    Args:
      module: a linear layer, a convolution or an embedding, flaxstab's or NNX's.
      name: the variable's attribute, such as ``"kernel"``; the dtype is kept.
      init: draws it, e.g. ``initializers.orthogonal()``.
      rngs: source of the key; the ``params`` stream is used.

    Raises:
      ValueError: if the layer has no such variable (``None`` counts as none), or its type is
        none of these, the shape shows that the stack's axes do not come first, or ``rngs`` has
        neither a ``params`` stream nor a default one.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import initializers, linear, surgery
      >>> def rule(module, *, rngs):
      ...     if isinstance(module, linear.Linear):
      ...         redraw(module, "kernel", initializers.xavier_normal(), rngs=rngs)
      >>> surgery.init_weights(linear.Linear(2, 3, rngs=nnx.Rngs(0)), rule, rngs=nnx.Rngs(1))
    """
    variable, (drawn, held) = _variable(module, name), _held(module, name)
    old = variable[...]
    stack = old.shape[: max(old.ndim - len(held), 0)]
    check(
        old.shape == (*stack, *held),
        f"the {name} of stacked layers must end in the shape of a single one, {held}",
        fix="Stack along the first axis.",
        shape=old.shape,
    )

    def draw(key: Array) -> Array:
        return jnp.asarray(init(key, drawn, old.dtype), old.dtype).reshape(held)

    key = check_rngs(rngs).params()
    if stack:
        new = jax.vmap(draw)(jax.random.split(key, math.prod(stack))).reshape(old.shape)
    else:
        new = draw(key)
    # A traced array has no place yet, and an uncommitted one must stay free to move.
    placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed
    variable[...] = jax.device_put(new, old.sharding) if placed else new


def _variable(module: nnx.Module, name: str) -> nnx.Variable[Array]:
    variables = {n: v for n, v in vars(module).items() if isinstance(v, nnx.Variable)}
    if name not in variables:
        raise ValueError(
            f"name must be a variable that the layer holds, got name={name!r} and a "
            f"{type(module).__name__} with {', '.join(variables) or 'none'}."
        )
    return variables[name]


def _held(module: nnx.Module, name: str) -> _Held:
    shapes = next((of(module) for kind, of in _SHAPES.items() if isinstance(module, kind)), {})
    check(
        name in shapes,
        "redraw must know a variable's shape, as it does for linear layers, convolutions and "
        "embeddings",
        fix=f"Set module.{name}[...] yourself.",
        name=name,
        module_type=type(module).__name__,
    )
    held = tuple(shapes[name])
    if isinstance(module, nnx.LinearGeneral):
        sizes = (math.prod(module.in_features), math.prod(module.out_features))
        return _Held(sizes if name == "kernel" else sizes[1:], held)
    return _Held(held, held)


def init_layer(
    module: nnx.Module, nonlin: str = "relu", leaky_slope: float = 0.01, *, rngs: nnx.Rngs
) -> None:
    """Initialises a linear layer or a 2-D convolution for its activation, bias 0, in place.

    Document 2's ``init_layer`` (B-5): tanh, sigmoid and linear get Xavier's uniform law,
    ``'leaky_relu'`` Kaiming's normal one with the gain of its slope, everything else Kaiming's
    with the gain of ReLU. Other modules are left alone, 1-D and 3-D convolutions too. Stacked
    layers are drawn one by one. A rule for :func:`flaxstab.surgery.init_weights`, also as
    ``functools.partial(init_layer, nonlin="gelu")``.

    Args:
      module: any module; flaxstab's ``Linear`` and ``Conv`` and NNX's ``Linear``, ``Conv`` and
        ``LinearGeneral`` are initialised.
      nonlin: the activation behind the layer.
      leaky_slope: slope of ``'leaky_relu'``.
      rngs: source of the keys; the ``params`` stream is used.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> init_layer(layer, nonlin="tanh", rngs=nnx.Rngs(1))
      >>> layer.bias[...].tolist()
      [0.0, 0.0, 0.0]
    """
    if isinstance(module, Conv | nnx.Conv) and len(module.kernel_size) != 2:
        return
    if isinstance(module, Linear | nnx.Linear | nnx.LinearGeneral | Conv | nnx.Conv):
        redraw(module, "kernel", _law(nonlin, leaky_slope), rngs=rngs)
        if module.bias is not None:
            redraw(module, "bias", initializers.zeros, rngs=rngs)


def _law(nonlin: str, leaky_slope: float) -> Initializer:
    if nonlin in initializers.XAVIER:
        return initializers.xavier_uniform()
    if nonlin == "leaky_relu":
        return initializers.kaiming_normal(leaky_slope, nonlinearity="leaky_relu")
    return initializers.kaiming_normal(nonlinearity="relu")
