"""Document 2's recipes by architecture (sections G and N) as frozen configs that build things.

``cnn`` (G-1), ``small_batch`` (G-3) and ``transformer`` (G-2) say how to initialise, normalise,
drop and decay, and which trick keeps the start stable. ``print(recipes.cnn)`` shows each choice
with its section. Where the document gives a range, the value lies in it; where its sections differ
(dropout of CNNs: 0 to 0.3 in E-2, 0 to 0.2 in N; decay under SGD: to 1e-2 in G-1, to 1e-3 in N),
the recipe follows the one that it cites. ``dataclasses.replace(recipes.cnn, dropout=0.1)`` makes
another recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp

from flaxstab import functional, initializers, norms
from flaxstab._checks import check, check_probability
from flaxstab._typing import Array, DTypeLike, Initializer, Shape
from flaxstab.blocks import MakeNorm, Residual


class Source(NamedTuple):
    """Where document 2 says something of one part of a recipe.

    Attributes:
      part: the part's name.
      section: the section.
      says: what it says there, in few words.
      low: where it gives a range, the smallest value.
      high: the largest.
    """

    part: str
    section: str
    says: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to build and train one architecture.

    The parts are arguments of other pieces: ``norm``, ``act``, ``kernel_init`` and ``residual`` of
    blocks, ``dropout`` of their ``drop``, ``weight_decay`` of :func:`flaxstab.optim.adamw` together
    with :func:`flaxstab.optim.decay_mask`, which exempts what ``no_decay`` names.

    Args:
      kernel_init: draws kernels.
      bias_init: draws biases.
      norm: builds a normalisation layer for a number of channels.
      act: the activation.
      pre_norm: whether a residual branch begins with the norm (pre-activation, Pre-LN).
      residual: how a branch is added, and how it starts.
      dropout: the probability of dropping.
      attention_dropout: that of dropping an attention weight; ``None`` = there is no attention.
      optimizer: its name in :mod:`flaxstab.optim`.
      weight_decay: decoupled decay; each step takes its product with the learning rate.
      no_decay: the roles of parameters that do not decay.
      augmentation: what to do to images, which this library leaves to others; ``None`` = nothing.
      sources: where the document says so, for every part that is not ``None``.

    Raises:
      ValueError: if a number is out of its range, or a part has no source.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import blocks, optim, recipes
      >>> recipe = recipes.cnn
      >>> block = blocks.BasicBlock(
      ...     16, 16, norm=recipe.norm, act=recipe.act, kernel_init=recipe.kernel_init,
      ...     residual=recipe.residual, rngs=nnx.Rngs(0),
      ... )
      >>> mask = optim.decay_mask(block)
      >>> tx = optim.adamw(3e-4, weight_decay=recipe.weight_decay, mask=mask)
      >>> optimizer = nnx.Optimizer(block, tx, wrt=nnx.Param)
      >>> recipe.source("weight_decay").says
      'AdamW 0.01 to 0.1; SGD 1e-4 to 1e-2'
    """

    kernel_init: Initializer
    bias_init: Initializer
    norm: MakeNorm
    act: Callable[[Array], Array]
    pre_norm: bool
    residual: Residual
    dropout: float
    attention_dropout: float | None = None
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: float
    no_decay: tuple[str, ...] = ("bias", "normalisation")
    augmentation: str | None = None
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        check_probability(dropout=self.dropout, attention_dropout=self.attention_dropout or 0.0)
        check(
            self.weight_decay >= 0,
            "weight_decay must be at least 0",
            weight_decay=self.weight_decay,
        )
        cited = {source.part for source in self.sources}
        left = [name for name in self._parts() if name not in cited]
        fix = "Add a Source that says where the document says so."
        check(not left, "every part must have a source", fix=fix, without=left)

    def source(self, part: str) -> Source:
        """Returns where the document says what a part is.

        Raises:
          ValueError: if it does not, or there is no such part.
        """
        found = next((source for source in self.sources if source.part == part), None)
        if found is None:
            known = ", ".join(source.part for source in self.sources)
            raise ValueError(f"part must be one of {known}, got part={part!r}.")
        return found

    def _parts(self) -> list[str]:
        names = (field.name for field in fields(self) if field.name != "sources")
        return [name for name in names if getattr(self, name) is not None]

    def __str__(self) -> str:
        rows = [("part", "value", "section", "the document")]
        for name in self._parts():
            _, section, says, *_ = self.source(name)
            rows.append((name, _shown(getattr(self, name)), section, says))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def _shown(value: object) -> str:
    """Returns a part's value in few characters."""
    if isinstance(value, partial):
        return f"{value.func.__name__}({', '.join(map(repr, value.args))})"
    if isinstance(value, Residual):
        default = Residual()
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        return ", ".join(f"{n}={v}" for n, v in own.items() if v != getattr(default, n))
    if callable(value):
        return str(getattr(value, "__name__", value)).lstrip("_")
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _he_normal(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
    return initializers.kaiming_normal(nonlinearity="relu")(key, shape, dtype)


_COMMON = (
    Source("bias_init", "N", "biases start at 0"),
    Source("no_decay", "F-2", "neither biases nor a norm's scale and bias decay"),
)

cnn = Recipe(
    kernel_init=_he_normal,
    bias_init=initializers.zeros,
    norm=norms.BatchNorm,
    act=functional.relu,
    pre_norm=False,
    residual=Residual(zero_init=True),
    dropout=0.0,
    weight_decay=0.05,
    augmentation="strong, in place of dropout",
    sources=(
        *_COMMON,
        Source("kernel_init", "G-1", "He, by the fan in"),
        Source("norm", "G-1", "BN for large batches; for small ones SyncBN or GN"),
        Source("act", "C-5", "convolution, BN, activation; ReLU wants He (N)"),
        Source("pre_norm", "C-5", "the usual order of CNNs; a last gamma of 0 needs it"),
        Source("residual", "G-1", "last gamma 0; or (N) the branch times 0.1"),
        Source("dropout", "N", "0 to 0.2 beside strong augmentation or decay", 0.0, 0.2),
        Source("optimizer", "N", "AdamW"),
        Source("weight_decay", "G-1", "AdamW 0.01 to 0.1; SGD 1e-4 to 1e-2", 0.01, 0.1),
        Source("augmentation", "G-1", "strong augmentation and decay instead of dropout"),
    ),
)
"""ResNets and other CNNs with large batches (G-1)."""

small_batch = Recipe(
    kernel_init=_he_normal,
    bias_init=initializers.zeros,
    norm=partial(norms.GroupNorm, 32),
    act=functional.relu,
    pre_norm=True,
    residual=Residual(zero_init=True),
    dropout=0.0,
    weight_decay=0.05,
    augmentation="CutMix, MixUp, RandAugment",
    sources=(
        *_COMMON,
        Source("kernel_init", "G-3", "He, as ever"),
        Source("norm", "G-3", "GroupNorm with 32 groups"),
        Source("act", "I-1", "ReLU in the block with GN"),
        Source("pre_norm", "I-1", "norm, ReLU, convolution"),
        Source("residual", "N", "start at 0, here by the last convolution; or times 0.1"),
        Source("dropout", "G-3", "little or none; N: 0 to 0.2", 0.0, 0.2),
        Source("optimizer", "N", "AdamW"),
        Source("weight_decay", "N", "0.01 to 0.1", 0.01, 0.1),
        Source("augmentation", "G-3", "strong: CutMix, MixUp, RandAugment"),
    ),
)
"""Vision with small batches or large images (G-3)."""

transformer = Recipe(
    kernel_init=_he_normal,
    bias_init=initializers.zeros,
    norm=norms.LayerNorm,
    act=functional.gelu,
    pre_norm=True,
    residual=Residual(scale=0.1),
    dropout=0.1,
    attention_dropout=0.1,
    weight_decay=0.05,
    sources=(
        *_COMMON,
        Source("kernel_init", "G-2", "Kaiming or truncated normal, by the fan in"),
        Source("norm", "G-2", "LayerNorm"),
        Source("act", "I-2", "GELU, the exact one"),
        Source("pre_norm", "G-2", "Pre-LN: norm, sublayer, addition"),
        Source("residual", "G-2", "the branch times 0.1"),
        Source("dropout", "G-2", "0.1 to 0.2 in the feed-forward part", 0.1, 0.2),
        Source("attention_dropout", "G-2", "0 to 0.1 of the attention weights", 0.0, 0.1),
        Source("optimizer", "G-2", "AdamW"),
        Source("weight_decay", "G-2", "AdamW 0.05 to 0.1", 0.05, 0.1),
    ),
)
"""Transformers with Pre-LN blocks (G-2)."""
