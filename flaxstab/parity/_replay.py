"""Lets PyTorch's random layers use the draws that a Flax model is about to make."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.attention import MultiHeadAttention
from flaxstab.dropout import AlphaDropout, ChannelDropout, Dropout, DropPath, RecurrentDropout
from flaxstab.dropout._base import Dropping
from flaxstab.parity._inputs import Layout, channels_first
from flaxstab.parity._replay_attention import attention_draw, attention_rate, replay_attention

if TYPE_CHECKING:
    import torch

_ENOUGH = 48  # bits: of 1,000 such masks two are equal by chance with probability 2e-9

Draw = Callable[[nnx.Module, Shape], np.ndarray]
Apply = Callable[..., "torch.Tensor"]


class _Replay(NamedTuple):
    """How a random layer is replayed.

    Attributes:
      draw: from the layer and the input's shape, features last, to what it draws.
      apply: from torch's module, its input and the draw to its output.
      kinds: names of torch's modules that do the same; none for a registered layer, which may have
        any counterpart.
      layout: that of torch's input: the one given for the model, or always the same one.
    """

    draw: Draw
    apply: Apply
    kinds: tuple[str, ...] = ()
    layout: Literal["given", "image", "same"] = "given"


def _kept(layer: nnx.Module, shape: Shape) -> np.ndarray:
    # What alpha dropout drops of ones becomes negative, and 0 for p 1.
    return np.asarray(layer(jnp.ones(shape))) > 0


def _kept_channels(layer: nnx.Module, shape: Shape) -> np.ndarray:
    one = (slice(1),) * (len(shape) - 2)
    return _kept(layer, shape)[:, *one]  # (N, *space, C) -> (N, 1, ..., 1, C)


def _kept_samples(layer: nnx.Module, shape: Shape) -> np.ndarray:
    one = (slice(1),) * (len(shape) - 1)
    return _kept(layer, shape)[:, *one]  # (N, ...) -> (N, 1, ..., 1)


def _dropped(module: "torch.nn.Module", x: "torch.Tensor", kept: "torch.Tensor") -> "torch.Tensor":
    p = torch_rate(module)
    return x * (kept.to(x.dtype) * (0.0 if p == 1 else 1 / (1 - p)))


def _dropped_channels(
    module: "torch.nn.Module", x: "torch.Tensor", kept: "torch.Tensor"
) -> "torch.Tensor":
    axes = {"Dropout1d": 3, "Dropout2d": 4, "Dropout3d": 5}[type(module).__name__]
    rule = f"torch's {type(module).__name__} must get {axes} axes, batch and channels first"
    check(x.ndim == axes, rule, shape=tuple(x.shape))
    return _dropped(module, x, kept)


def _dropped_alpha(
    module: "torch.nn.AlphaDropout", x: "torch.Tensor", kept: "torch.Tensor"
) -> "torch.Tensor":
    """Computes what ``torch.alpha_dropout`` does, in its order."""
    if module.p == 1:
        return x * 0
    alpha = 1.7580993408473766
    scale = 1 / math.sqrt((alpha**2 * module.p + 1) * (1 - module.p))
    noise = kept.to(x.dtype)
    return x * (noise * scale) + ((noise - 1) * (alpha * scale) + alpha * scale * module.p)


class Draws:
    """The draws that were replayed, kept to notice one that comes twice.

    Attributes:
      repeated: names of the layers that drew the same mask twice.
    """

    def __init__(self) -> None:
        self.repeated: set[str] = set()
        self._seen: set[int] = set()

    def add(self, name: str, drawn: np.ndarray) -> None:
        """Remembers a layer's draw, unless two may be equal by chance."""
        if drawn.dtype == np.bool_:
            kept = float(drawn.mean())
            enough = -drawn.size * np.log2(kept**2 + (1 - kept) ** 2) >= _ENOUGH
        else:
            enough = drawn.size > 1 and bool(np.ptp(drawn) > 0)
        if not enough:
            return
        mark = hash((name, drawn.shape, drawn.tobytes()))
        if mark in self._seen:
            self.repeated.add(name)
        self._seen.add(mark)


_DROPOUT = _Replay(_kept, _dropped, ("Dropout",))
_CHANNELS = ("Dropout1d", "Dropout2d", "Dropout3d")
_REPLAYS: dict[type[nnx.Module], _Replay] = {
    Dropout: _DROPOUT,
    nnx.Dropout: _DROPOUT,
    ChannelDropout: _Replay(_kept_channels, _dropped_channels, _CHANNELS, "image"),
    AlphaDropout: _Replay(_kept, _dropped_alpha, ("AlphaDropout",)),
    DropPath: _Replay(_kept_samples, _dropped, ("DropPath", "StochasticDepth")),
    RecurrentDropout: _Replay(_kept_channels, _dropped, ("RecurrentDropout",), "same"),
}
_DROPOUTS = tuple(_REPLAYS)
# Not torch's own: torch_ref's, timm's DropPath, torchvision's StochasticDepth.
_BY_NAME = ("DropPath", "StochasticDepth", "RecurrentDropout")


def register_replay(module_type: type[nnx.Module], *, draw: Draw, apply: Apply) -> None:
    """Teaches :func:`replayed` a random layer of your own, such as one that adds noise.

    Args:
      module_type: the Flax layer's type.
      draw: from a copy of the layer and the input's shape (features last) to what it draws, as an
        array that broadcasts to the input; it must take its keys from the layer's own streams.
      apply: from PyTorch's layer, its input and that draw (a tensor) to its output.

    Raises:
      ValueError: if the type is registered already.

    Example:
      >>> class Noise(nnx.Module):
      ...     def __init__(self, std, rngs):
      ...         self.std, self.rngs, self.deterministic = std, rngs, False
      ...     def __call__(self, x):
      ...         noise = 0 if self.deterministic else self.rngs.noise.normal(x.shape)
      ...         return x + self.std * noise
      >>> register_replay(
      ...     Noise,
      ...     draw=lambda layer, shape: layer.rngs.noise.normal(shape),
      ...     apply=lambda module, x, draw: x + module.std * draw,
      ... )
    """
    check(
        module_type not in _REPLAYS,
        "a module type is registered once",
        module_type=module_type.__name__,
    )
    _REPLAYS[module_type] = _Replay(draw, apply)


@contextmanager
def replayed(
    flax_model: nnx.Module,
    torch_model: "torch.nn.Module",
    layout: Layout = None,
    draws: Draws | None = None,
    rename: Callable[[str], str] | None = None,
) -> Iterator[Draws]:
    """Gives the torch model the random draws that the Flax model would make now.

    Run torch's step inside the block, then the Flax step: both drop the same elements. The Flax
    model's streams are read, not advanced; a layer that is called twice draws twice. Replayed are
    the layers of :mod:`flaxstab.dropout`, ``nnx.Dropout``,
    :class:`flaxstab.attention.MultiHeadAttention` and types given to :func:`register_replay`; not
    the state of a :class:`flaxstab.dropout.RecurrentDropoutCell`.

    Args:
      flax_model: a model in training mode.
      torch_model: its twin, with layers of the same names.
      layout: ``'image'`` if torch's tensors have the channels at axis 1.
      draws: where to keep what is drawn, if masks should be new from step to step, too.
      rename: from a torch module's name to the Flax one's.

    Yields:
      What is drawn: ``draws.repeated`` names layers that drew the same mask twice.

    Raises:
      ValueError: if a torch dropout layer or attention that drops anything has no counterpart or
        another probability, is of another kind, or works in place; or if a Flax dropout's
        counterpart is no dropout of its kind.
    """
    layers, kept = interop.named_modules(flax_model), draws or Draws()
    handles = []
    for name, module in torch_model.named_modules():
        source = layers.get(_renamed(name, rename))
        if attention_rate(module) or attention_rate(source):
            handles += replay_attention(name, module, source, partial(kept.add, name))
            continue
        if torch_rate(module) > 0 or _rate(source) > 0:
            _check_dropout(name, module, source)
        elif isinstance(source, _DROPOUTS):
            continue
        if source is not None and type(source) in _REPLAYS:
            hook = _hook(name, nnx.clone(source), layout, kept)
            handles.append(module.register_forward_hook(hook))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def drawn_by(flax_model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns what each random layer of a model would draw now, for inputs of one small shape.

    Tells whether the random stream that a model takes has changed; needs no PyTorch.

    Args:
      flax_model: a model in training mode; it is not changed.
    """
    found: dict[str, np.ndarray] = {}
    for name, module in interop.named_modules(flax_model).items():
        if isinstance(module, MultiHeadAttention) and module.p > 0:
            found[name] = attention_draw(nnx.clone(module), (1, 2, 4, 8))
        elif type(module) in _REPLAYS and (_rate(module) > 0 or not isinstance(module, _DROPOUTS)):
            found[name] = np.asarray(_REPLAYS[type(module)].draw(nnx.clone(module), (8, 4, 4, 8)))
    return found


def _renamed(name: str, rename: Callable[[str], str] | None) -> str:
    try:
        return name if rename is None else rename(name)
    except KeyError:  # a table of tensors does not know modules
        return name


def _rate(source: nnx.Module | None) -> float:
    """Returns with which probability a Flax layer drops, 0 if it is no dropout."""
    if isinstance(source, nnx.Dropout):
        return source.rate
    return source.p if isinstance(source, Dropping) else 0.0


def torch_rate(module: "torch.nn.Module") -> float:
    """Returns with which probability a torch module drops, 0 if it is none of the known kinds."""
    import torch

    own = isinstance(module, torch.nn.modules.dropout._DropoutNd)
    if not own and type(module).__name__ not in _BY_NAME:
        return 0.0
    return getattr(module, "p", getattr(module, "drop_prob", None)) or 0.0


def _is_kind(module: "torch.nn.Module", kinds: tuple[str, ...]) -> bool:
    """Whether a module is of a kind; a torch name means torch's own class."""
    import torch

    kind = type(module)
    named = kind.__name__ in kinds and getattr(torch.nn, kind.__name__, kind) is kind
    by_rows = getattr(module, "mode", "row") == "row" and getattr(module, "scale_by_keep", True)
    return named and by_rows and not getattr(module, "inplace", False)


def _check_dropout(name: str, module: "torch.nn.Module", source: nnx.Module | None) -> None:
    kinds = next((_REPLAYS[k].kinds for k in _DROPOUTS if isinstance(source, k)), ())
    if not _is_kind(module, kinds) or _rate(source) != torch_rate(module):
        raise ValueError(
            "every torch dropout must be a torch.nn.Dropout, not in place, with a flaxstab or nnx "
            "Dropout of its name and probability; likewise an AlphaDropout, a RecurrentDropout, a "
            "DropPath or StochasticDepth of rows with a flaxstab DropPath, and a Dropout1d, "
            f"Dropout2d or Dropout3d with a flaxstab ChannelDropout, got {name!r}: {module} and "
            f"{type(source).__name__} of probability {_rate(source)}. "
            "Give both the same probability, or set it to 0."
        )


def check_silent(torch_model: "torch.nn.Module") -> None:
    """Refuses dropout whose draws nobody can replay: the other side is no NNX module.

    Raises:
      ValueError: if a torch dropout layer, or attention, drops anything.
    """
    for name, module in torch_model.named_modules():
        if torch_rate(module) > 0 or attention_rate(module) > 0:
            raise ValueError(
                "dropout is replayed for NNX modules only, got a Linen module or a function beside "
                f"{name!r}: {module}. Set the probability to 0 on both sides."
            )


def _hook(
    name: str, layer: nnx.Module, layout: Layout, draws: Draws
) -> Callable[..., "torch.Tensor"]:
    replay = _REPLAYS[type(layer)]
    layouts: dict[str, Layout] = {"given": layout, "image": "image", "same": None}
    own = layouts[replay.layout]

    def hook(
        module: "torch.nn.Module", inputs: "tuple[torch.Tensor]", output: "torch.Tensor"
    ) -> "torch.Tensor":
        import torch

        if not module.training:
            return output
        x = inputs[0]
        image = own == "image" and x.ndim > 2
        shape = (x.shape[0], *x.shape[2:], x.shape[1]) if image else tuple(x.shape)
        drawn = np.asarray(replay.draw(layer, shape))
        draws.add(name, drawn)
        wide = drawn.astype(np.float64) if drawn.dtype == np.bool_ else drawn
        return replay.apply(module, x, torch.tensor(channels_first(wide, own)))

    return hook
