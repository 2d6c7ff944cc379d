"""Layer-wise learning-rate decay: the deeper a layer lies, the slower it learns."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import optax
from flax import nnx

from flaxstab._checks import check
from flaxstab.optim._hypers import check_number
from flaxstab.optim._masks import role_of, within
from flaxstab.optim._paths import Parameter, Path, chosen, like, parameters, table


class Depth(NamedTuple):
    """How deep a parameter lies, and the factor of its learning rate.

    Attributes:
      shape: the parameter's shape.
      depths: 0 for what the input meets first; one for each layer of a stack, otherwise one.
      factors: a number for each of them, of a shape that multiplies the parameter's.
    """

    shape: tuple[int, ...]
    depths: tuple[int, ...]
    factors: np.ndarray


class LayerDecay:
    """A function from a tree of parameters to a like tree of factors of the learning rate.

    For :func:`scale_updates`. Print it to see them.

    Attributes:
      depths: where every parameter lies, by path.
    """

    def __init__(self, depths: Mapping[Path, Depth]) -> None:
        self.depths = dict(depths)

    def __call__(self, params: optax.Params) -> optax.Params:
        """Returns the factors in a tree like ``params``.

        Raises:
          ValueError: if a leaf is not a parameter of the model that this was made for.
        """
        return like(params, lambda path: self.depths[path].factors, self.depths)

    def __str__(self) -> str:
        rows = [
            (
                path,
                found.shape,
                _range(found.depths),
                _range([f"{f:.4g}" for f in found.factors.flat]),
            )
            for path, found in self.depths.items()
        ]
        return table(("parameter", "shape", "depth", "factor"), *rows)


def layer_decay(
    model: nnx.Module, decay: float, *, blocks: str, stem: tuple[object, ...] = ()
) -> LayerDecay:
    """Returns factors of the learning rate, each layer's ``decay`` times that of the one behind it.

    Of L blocks, block k has the factor ``decay ** (L - k)``; what comes before them, embeddings and
    what ``stem`` takes, ``decay ** (L + 1)``; everything else (final norm, head) 1. This is what
    BEiT and timm's ``layer_decay`` do. Blocks that ``nnx.vmap`` or ``nnx.scan`` has stacked along
    their first axis get a factor for each layer.

    Args:
      model: the model; only its structure is read.
      decay: the factor from a layer to the one before it, above 0; 0.65 to 0.8 to fine-tune a ViT.
      blocks: where the blocks are, such as ``"blocks"`` or ``"encoder.layers"``: an ``nnx.List`` of
        modules, first layer first, or a stacked module.
      stem: nnx filters of what lies before the blocks. Tables of ``Embed`` layers and parameters
        whose ``role`` names an embedding or a token are counted there anyway.

    Returns:
      The factors: ``optax.chain(optim.adamw(rate), optim.scale_updates(factors))``.

    Raises:
      ValueError: if there are no parameters at ``blocks``, a stack has no common length or holds a
        list, ``decay`` is out of range, or a filter takes nothing.

    Example:
      >>> from flax import nnx
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         make = lambda: nnx.Linear(4, 4, use_bias=False, rngs=rngs)
      ...         self.embed = nnx.Embed(9, 4, rngs=rngs)
      ...         self.blocks = nnx.List([make(), make()])
      ...         self.head = make()
      >>> print(layer_decay(Net(nnx.Rngs(0)), 0.5, blocks="blocks"))
      parameter        shape   depth  factor
      blocks.0.kernel  (4, 4)  1      0.25
      blocks.1.kernel  (4, 4)  2      0.5
      embed.embedding  (9, 4)  0      0.125
      head.kernel      (4, 4)  3      1

    Reference:
      H. Bao, L. Dong, S. Piao, F. Wei, "BEiT: BERT Pre-Training of Image Transformers", 2021,
      arXiv:2106.08254; its code for fine-tuning numbers the layers as here.
    """
    check_number("decay", decay)
    check(0 < decay < math.inf, "decay must be finite and above 0", fix="", decay=decay)
    place, known = tuple(blocks.split(".")), list(parameters(model))
    inside = [p for p in known if p.path[: len(place)] == place]
    check(
        len(inside) > 0,
        "blocks must be the path of the model's blocks",
        fix="Such as 'blocks', or 'encoder.layers'; print nnx.state(model) to see paths.",
        blocks=blocks,
    )
    listed = inside[0].path[len(place) :][:1]
    stacked = not (listed and listed[0].isdecimal())
    last = 1 + (_stacked(inside, blocks) if stacked else _listed(inside, place))
    first = set().union(*chosen(model, stem))

    def depth(parameter: Parameter) -> Depth:
        if parameter.path[: len(place)] != place:
            before = within(parameter.path, first) or _is_embedding(parameter)
            return _depth(parameter, [0 if before else last], decay, last)
        own = range(1, last) if stacked else [int(parameter.path[len(place)]) + 1]
        return _depth(parameter, own, decay, last)

    return LayerDecay({parameter.path: depth(parameter) for parameter in known})


def _depth(parameter: Parameter, depths: Sequence[int], decay: float, last: int) -> Depth:
    # (L,) -> (L, 1, ..., 1), or () for a single depth
    shape = (-1,) + (1,) * (len(parameter.shape) - 1) if len(depths) > 1 else ()
    factors = np.array([decay ** (last - depth) for depth in depths]).reshape(shape)
    return Depth(parameter.shape, tuple(depths), factors)


def _listed(inside: Sequence[Parameter], place: Path) -> int:
    """Returns how many blocks a list holds."""
    return 1 + max(int(p.path[len(place)]) for p in inside)


def _stacked(inside: Sequence[Parameter], blocks: str) -> int:
    """Returns how many layers are stacked along the first axis."""
    below = [p.path[len(blocks.split(".")) :] for p in inside]
    is_stack = all(path[:1] == ("block",) for path in below)  # of flaxstab.models.Stack
    numbered = sorted({".".join(path) for path in below if any(map(str.isdecimal, path))})
    check(
        is_stack or not numbered,
        "blocks must be the list itself, or a module whose layers are stacked along the first axis",
        fix="Lists lie below it: pass the path of the one that holds the blocks.",
        blocks=blocks,
        listed=numbered,
    )
    lengths = {p.shape[:1] for p in inside}
    check(
        len(lengths) == 1 and lengths != {()},
        "blocks must be an nnx.List, or a module whose layers are stacked along the first axis",
        blocks=blocks,
        lengths=sorted(lengths),
    )
    return lengths.pop()[0]


def _is_embedding(parameter: Parameter) -> bool:
    role = role_of(parameter)
    return "embedding" in role or "token" in role


def _range(values: Sequence[object]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
