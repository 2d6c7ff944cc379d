"""Residual branches that start at zero and stay trainable: one table of block types."""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array
from flaxstab.blocks import (
    BasicBlock,
    Bottleneck,
    PreActBottleneck,
    PreActResBlock,
    TransformerBlock,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from flaxstab.linear import Linear
from flaxstab.surgery._walk import check_model

_Path = tuple[object, ...]
_Last = Callable[..., Sequence[nnx.Variable[Array]]]


def last_parameters(*layers: nnx.Module) -> list[nnx.Variable[Array]]:
    """Returns what must be 0 for these layers to return 0: scale or kernel, and a bias.

    Args:
      *layers: the layers that end a block's branches.

    Raises:
      ValueError: if one has neither a scale nor a kernel to train, like a norm without affine
        parameters, a frozen one, or attention, whose output layer has them.
    """
    found: list[nnx.Variable[Array]] = []
    for layer in layers:
        check(
            isinstance(layer, nnx.Module),
            "last_parameters takes layers",
            layer_type=type(layer).__name__,
        )
        held = {n: vars(layer).get(n) for n in ("scale", "kernel", "bias")}
        own = {n: v for n, v in held.items() if isinstance(v, nnx.Param)}
        if not own.keys() - {"bias"}:
            raise ValueError(
                f"its last layer is a {type(layer).__name__} without a scale or a kernel to train. "
                "Give a norm affine parameters; of a module made of layers, such as attention, "
                "name its output layer."
            )
        found += own.values()
    return found


def refuse_post_norm(block: nnx.Module) -> NoReturn:
    """Says why a block that ends in a norm, such as Post-LN, has nothing that may start at zero.

    Raises:
      ValueError: always; for :func:`register_residual`.
    """
    del block
    raise ValueError(
        "its norm stands behind the addition, so a zero scale would make the whole block 0, skip "
        "and all. Use Pre-LN."
    )


def _of_transformer_block(block: TransformerBlock) -> Sequence[nnx.Variable[Array]]:
    linear = [layer for layer in block.ff.layers if isinstance(layer, Linear)]
    return last_parameters(block.attn.out, linear[-1])


def _of_encoder_layer(layer: TransformerEncoderLayer) -> Sequence[nnx.Variable[Array]]:
    if not layer.norm_first:
        refuse_post_norm(layer)
    return last_parameters(layer.self_attn.out, layer.linear2)


def _of_decoder_layer(layer: TransformerDecoderLayer) -> Sequence[nnx.Variable[Array]]:
    if not layer.norm_first:
        refuse_post_norm(layer)
    return last_parameters(layer.self_attn.out, layer.multihead_attn.out, layer.linear2)


_RESIDUAL: dict[type[nnx.Module], _Last] = {
    BasicBlock: lambda block: last_parameters(block.bn2),
    Bottleneck: lambda block: last_parameters(block.bn3),
    PreActBottleneck: lambda block: last_parameters(block.conv3),
    PreActResBlock: lambda block: last_parameters(block.conv2),
    TransformerBlock: _of_transformer_block,
    TransformerDecoderLayer: _of_decoder_layer,
    TransformerEncoderLayer: _of_encoder_layer,
}


def register_residual(block_type: type[nnx.Module], last: _Last) -> None:
    """Teaches :func:`zero_last_gamma` a residual block of your own.

    Args:
      block_type: the block's type; it serves subclasses, too.
      last: from a block to the variables that start at zero: those of the layer that ends each
        branch, see :func:`last_parameters`. If that is a norm, no activation may follow before
        the addition: behind scale = bias = 0 a ReLU has zero gradient for ever. It raises a
        ``ValueError`` with the reason if there are none (:func:`refuse_post_norm`).

    Raises:
      ValueError: if ``block_type`` is no subclass of ``nnx.Module``, ``last`` no function, or the
        type is registered already.

    Example:
      >>> from flax import nnx
      >>> class Block(nnx.Module):
      ...     def __init__(self, d, rngs):
      ...         self.norm, self.out = nnx.LayerNorm(d, rngs=rngs), nnx.Linear(d, d, rngs=rngs)
      ...     def __call__(self, x):
      ...         return x + self.out(self.norm(x))
      >>> register_residual(Block, lambda block: last_parameters(block.out))
      >>> zero_last_gamma(Block(4, nnx.Rngs(0)))
      ['out.bias', 'out.kernel']
    """
    check(
        isinstance(block_type, type) and issubclass(block_type, nnx.Module),
        "block_type must be a subclass of nnx.Module",
        fix="Pass the class itself.",
        block_type=block_type,
    )
    check(callable(last), "last must be a function from a block to variables", last=last)
    check(
        block_type not in _RESIDUAL,
        "a block type is registered once",
        block_type=block_type.__name__,
    )
    _RESIDUAL[block_type] = last


def zero_last_gamma(model: nnx.Module) -> list[str]:
    """Makes every residual branch of a model start at zero and stay trainable, in place.

    Each block then starts as its skip path. Post-activation blocks: the scale of the last norm,
    and its bias (which is 0 by default). Pre-activation blocks: the last convolution's kernel; the
    documents name the last gamma here as well, but behind scale = bias = 0 the ReLU has zero
    gradient for ever. Pre-LN blocks: kernel and bias of the output projections. Post-LN has no
    such start and is refused. Stacked blocks work as they are.

    Only blocks of known types are found: of a model that mixes them with others, the others stay
    as they are. So check the names that are returned.

    Args:
      model: a model with residual blocks of :mod:`flaxstab.blocks` or registered types.

    Returns:
      The names of the variables that are now 0, sorted by path: ``blocks.2`` before ``blocks.10``.

    Raises:
      ValueError: if the model is no ``nnx.Module``, or has no such block, or one that cannot start
        at zero; nothing is zeroed then.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import blocks
      >>> zero_last_gamma(blocks.BasicBlock(4, 4, rngs=nnx.Rngs(0)))
      ['bn2.bias', 'bn2.scale']

    Reference:
      P. Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677 (section 5.1).
    """
    check_model(model)
    paths = {id(v): p for p, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
    found: dict[_Path, nnx.Variable[Array]] = {}
    for path, block in nnx.iter_modules(model):
        kind = next((kind for kind in type(block).__mro__ if kind in _RESIDUAL), None)
        if kind is None:
            continue
        for variable in _last_of(path, block, _RESIDUAL[kind]):
            found[_path_of(variable, paths, block)] = variable
    check(
        bool(found),
        "the model must have a residual block that surgery knows",
        fix="Call flaxstab.surgery.register_residual for its type.",
        model=type(model).__name__,
    )
    for variable in found.values():
        variable[...] = jnp.zeros_like(variable[...])
    return [".".join(map(str, path)) for path in paths.values() if path in found]


def _last_of(path: _Path, block: nnx.Module, last: _Last) -> Sequence[nnx.Variable[Array]]:
    try:
        found = last(block)
    except ValueError as reason:
        raise ValueError(
            "every residual branch must be able to start at zero and train, got "
            f"{'.'.join(map(str, path))!r} {type(block).__name__}: {reason}"
        ) from None
    check(
        isinstance(found, Sequence),
        "register_residual's function must return a list of variables",
        fix="Put a single one into a list.",
        returned=type(found).__name__,
        block=type(block).__name__,
    )
    check(
        len(found) > 0,
        "register_residual's function must return a variable, or say why there is none",
        block=type(block).__name__,
    )
    return found


def _path_of(variable: object, paths: Mapping[int, _Path], block: nnx.Module) -> _Path:
    check(
        id(variable) in paths,
        "register_residual's function must return variables of the model",
        returned=type(variable).__name__,
        block=type(block).__name__,
    )
    return paths[id(variable)]
