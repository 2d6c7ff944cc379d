"""Lets PyTorch's random layers use the draws that a Flax model is about to make."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.dropout import ChannelDropout, Dropout
from flaxstab.parity._inputs import Layout, channels_first
from flaxstab.parity._replay_attention import attention_rate, replay_attention

if TYPE_CHECKING:
    import torch

_ENOUGH = 48  # bits: of 1,000 such masks two are equal by chance with probability 2e-9

Draw = Callable[[nnx.Module, Shape], np.ndarray]
Apply = Callable[..., "torch.Tensor"]


class _Replay(NamedTuple):
    draw: Draw
    apply: Apply
    channelwise: bool = False  # torch's channels are at axis 1 whatever the model's layout


def _kept(layer: nnx.Module, shape: Shape) -> np.ndarray:
    return np.asarray(layer(jnp.ones(shape))) != 0


def _kept_channels(layer: nnx.Module, shape: Shape) -> np.ndarray:
    one = (slice(1),) * (len(shape) - 2)
    return _kept(layer, shape)[:, *one]  # (N, *space, C) -> (N, 1, ..., 1, C)


def _dropped(module: "torch.nn.Dropout", x: "torch.Tensor", kept: "torch.Tensor") -> "torch.Tensor":
    return x * (kept.to(x.dtype) * (0.0 if module.p == 1 else 1 / (1 - module.p)))


def _dropped_channels(
    module: "torch.nn.Module", x: "torch.Tensor", kept: "torch.Tensor"
) -> "torch.Tensor":
    axes = {"Dropout1d": 3, "Dropout2d": 4, "Dropout3d": 5}[type(module).__name__]
    rule = f"torch's {type(module).__name__} must get {axes} axes, batch and channels first"
    check(x.ndim == axes, rule, shape=tuple(x.shape))
    return _dropped(module, x, kept)


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


_DROPOUTS = (Dropout, ChannelDropout, nnx.Dropout)
_DROPOUT = _Replay(_kept, _dropped)
_REPLAYS: dict[type[nnx.Module], _Replay] = {
    Dropout: _DROPOUT,
    nnx.Dropout: _DROPOUT,
    ChannelDropout: _Replay(_kept_channels, _dropped_channels, channelwise=True),
}


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
    :class:`flaxstab.dropout.Dropout`, :class:`flaxstab.dropout.ChannelDropout`, ``nnx.Dropout``,
    :class:`flaxstab.attention.MultiHeadAttention` and types given to :func:`register_replay`.

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
    import torch

    layers, kept = interop.named_modules(flax_model), draws or Draws()
    handles = []
    for name, module in torch_model.named_modules():
        source = layers.get(_renamed(name, rename))
        if attention_rate(module) or attention_rate(source):
            handles += replay_attention(name, module, source, partial(kept.add, name))
            continue
        is_dropout = isinstance(module, torch.nn.modules.dropout._DropoutNd)
        if (is_dropout and module.p > 0) or _rate(source) > 0:
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


def _renamed(name: str, rename: Callable[[str], str] | None) -> str:
    try:
        return name if rename is None else rename(name)
    except KeyError:  # a table of tensors does not know modules
        return name


def _rate(source: nnx.Module | None) -> float:
    """Returns with which probability a Flax layer drops, 0 if it is no dropout."""
    if isinstance(source, Dropout | ChannelDropout):
        return source.p
    return source.rate if isinstance(source, nnx.Dropout) else 0.0


def _check_dropout(name: str, module: "torch.nn.Module", source: nnx.Module | None) -> None:
    import torch

    nn = torch.nn
    channelwise = isinstance(source, ChannelDropout)
    kinds = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d) if channelwise else (nn.Dropout,)
    plain = type(module) in kinds and not module.inplace
    if not plain or _rate(source) != module.p:
        raise ValueError(
            "every torch dropout must be a torch.nn.Dropout, not in place, with a flaxstab or nnx "
            "Dropout of its name and probability, or a Dropout1d, Dropout2d or Dropout3d with a "
            f"flaxstab ChannelDropout, got {name!r}: {module} and "
            f"{type(source).__name__} of probability {_rate(source)}. "
            "Give both the same probability, or set it to 0."
        )


def check_silent(torch_model: "torch.nn.Module") -> None:
    """Refuses dropout whose draws nobody can replay: the other side is no NNX module.

    Raises:
      ValueError: if a torch dropout layer, or attention, drops anything.
    """
    import torch

    for name, module in torch_model.named_modules():
        drops = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
        if drops or attention_rate(module) > 0:
            raise ValueError(
                "dropout is replayed for NNX modules only, got a Linen module or a function beside "
                f"{name!r}: {module}. Set the probability to 0 on both sides."
            )


def _hook(
    name: str, layer: nnx.Module, layout: Layout, draws: Draws
) -> Callable[..., "torch.Tensor"]:
    replay = _REPLAYS[type(layer)]
    own: Layout = "image" if replay.channelwise else layout

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
