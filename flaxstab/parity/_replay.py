"""Lets PyTorch's dropout layers use the masks that a Flax model is about to draw."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from flaxstab import functional, interop
from flaxstab.dropout import Dropout
from flaxstab.parity._inputs import Layout, channels_first

if TYPE_CHECKING:
    import torch


@contextmanager
def replayed_dropout(
    flax_model: nnx.Module, torch_model: "torch.nn.Module", layout: Layout = None
) -> Iterator[None]:
    """Gives the torch model the dropout masks that the Flax model would draw now.

    Run torch's step inside the block, then the Flax step: both drop the same elements. The Flax
    model's streams are read, not advanced; a layer that is called twice draws two masks.

    Args:
      flax_model: a model in training mode with :class:`flaxstab.dropout.Dropout` layers.
      torch_model: its twin, with ``torch.nn.Dropout`` layers of the same names.
      layout: ``'image'`` if torch's tensors have the channels at axis 1.

    Yields:
      Nothing.

    Raises:
      ValueError: if a torch dropout layer has no counterpart or another probability, is of
        another kind, or works in place.
    """
    import torch

    layers = interop.named_modules(flax_model)
    handles = []
    for name, module in torch_model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            source = layers.get(name)
            plain = type(module) is torch.nn.Dropout and not module.inplace
            if not plain or not isinstance(source, Dropout) or source.p != module.p:
                raise ValueError(
                    "every torch dropout must be a torch.nn.Dropout, not in place, with a flaxstab "
                    f"Dropout of its name and probability, got {name!r}: {module}."
                )
            handles.append(module.register_forward_hook(_hook(source, layout)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(source: Dropout, layout: Layout) -> object:
    stream = nnx.clone(source.rngs)

    def hook(
        module: "torch.nn.Dropout", inputs: "tuple[torch.Tensor]", output: "torch.Tensor"
    ) -> "torch.Tensor":
        import torch

        if not module.training or stream is None or module.p == 0:
            return output
        x = inputs[0]
        image = layout == "image" and x.ndim > 2
        shape = (x.shape[0], *x.shape[2:], x.shape[1]) if image else tuple(x.shape)
        mask = np.asarray(functional.dropout_mask(stream(), source.p, shape))
        kept = torch.tensor(channels_first(mask, layout)).to(x.dtype)
        return x * (kept * (0.0 if source.p == 1 else 1 / (1 - source.p)))

    return hook
