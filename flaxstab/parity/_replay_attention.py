"""Lets PyTorch's attention drop the probabilities that a Flax layer is about to drop."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
from flax import nnx

from flaxstab import functional
from flaxstab._typing import Array, Shape
from flaxstab.attention import MultiHeadAttention

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

Tell = Callable[[np.ndarray], None]
Function = Callable[..., "torch.Tensor"]
_NAMES = ("dropout", "scaled_dot_product_attention")


def attention_rate(module: object) -> float:
    """Returns with which probability an attention of either framework drops; 0 for all else."""
    import torch

    if isinstance(module, MultiHeadAttention):
        return module.p
    return module.dropout if isinstance(module, torch.nn.MultiheadAttention) else 0.0


def replay_attention(
    name: str, module: "torch.nn.Module", source: nnx.Module | None, tell: Tell
) -> "list[RemovableHandle]":
    """Makes PyTorch's attention drop by the masks of a Flax layer.

    ``torch.nn.MultiheadAttention`` has no dropout module to hook: it calls ``dropout`` or
    ``scaled_dot_product_attention`` of ``torch.nn.functional``. While it runs, these two are
    exchanged for ones that take the Flax layer's mask; all else is PyTorch's own code.

    Args:
      name: of PyTorch's module, for errors.
      module: that module.
      source: its Flax counterpart, which is copied.
      tell: is given each mask, shape ``(N, H, L, S)``.

    Returns:
      The hooks, to be removed.

    Raises:
      ValueError: if either drops anything and the other is no attention of its probability.
    """
    import torch

    alike = attention_rate(module) == attention_rate(source)
    twins = alike and isinstance(module, torch.nn.MultiheadAttention)
    if twins and isinstance(source, MultiHeadAttention):
        exchange = Exchange(nnx.clone(source), tell)
        return [
            module.register_forward_pre_hook(exchange.enter),
            module.register_forward_hook(exchange.leave, always_call=True),
        ]
    raise ValueError(
        "every torch.nn.MultiheadAttention with dropout must have a flaxstab MultiHeadAttention "
        f"of its name and probability, got {name!r}: {type(module).__name__} of probability "
        f"{attention_rate(module)} and {type(source).__name__} of probability "
        f"{attention_rate(source)}. Give both the same probability, or set it to 0."
    )


class Exchange:
    """Exchanges the two functions when PyTorch's module starts, and back when it has run."""

    def __init__(self, layer: MultiHeadAttention, tell: Tell) -> None:
        self.layer, self.tell = layer, tell
        self.originals: dict[str, Function] = {}

    def enter(self, module: "torch.nn.MultiheadAttention", inputs: object) -> None:
        """Is called before the module runs."""
        from torch.nn import functional as torch_functional

        del inputs
        if module.training:
            stand_ins = (self._dropout(module.num_heads), self.attention)
            for name, stand_in in zip(_NAMES, stand_ins, strict=True):
                self.originals[name] = vars(torch_functional)[name]
                setattr(torch_functional, name, stand_in)

    def leave(self, module: object, inputs: object, output: object) -> None:
        """Is called after the module has run, or failed."""
        from torch.nn import functional as torch_functional

        del module, inputs, output
        for name, original in self.originals.items():
            setattr(torch_functional, name, original)
        self.originals = {}

    def kept(self, shape: Shape) -> "torch.Tensor":
        """Returns which probabilities the layer's next call keeps."""
        import torch

        kept = attention_draw(self.layer, shape)
        self.tell(kept)
        return torch.tensor(kept)

    def _dropout(self, heads: int) -> Function:
        """Returns what stands for ``dropout`` of probabilities, shape ``(N * H, L, S)``."""

        def dropout(weights: "torch.Tensor", p: float) -> "torch.Tensor":
            _, length, keys = weights.shape
            kept = self.kept((len(weights) // heads, heads, length, keys))
            return _dropped(weights, kept.reshape(weights.shape), p)

        return dropout

    def attention(
        self,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        attn_mask: "torch.Tensor | None",
        dropout_p: float,
        is_causal: bool,
    ) -> "torch.Tensor":
        """Stands for ``scaled_dot_product_attention``, in the precision that it has on a CPU."""
        import torch

        kept = self.kept((*query.shape[:3], key.shape[2]))
        wide = torch.promote_types(query.dtype, torch.float32)
        bias = None if attn_mask is None else attn_mask.to(wide)
        plain = torch.ops.aten._scaled_dot_product_attention_math  # also tells the probabilities
        q, k, v = (tensor.to(wide) for tensor in (query, key, value))
        _, weights = plain(q, k, v, bias, 0.0, is_causal)
        return (_dropped(weights, kept, dropout_p) @ v).to(query.dtype)


def attention_draw(layer: MultiHeadAttention, shape: Shape) -> np.ndarray:
    """Returns which probabilities a layer's next call keeps, and counts that call.

    Args:
      layer: in training mode.
      shape: ``(N, H, L, S)``.
    """
    key = cast("Array", layer.next_key(deterministic=False))
    return np.asarray(functional.attention_dropout_mask(key, layer.p, shape))


def _dropped(weights: "torch.Tensor", kept: "torch.Tensor", p: float) -> "torch.Tensor":
    return weights * (kept.to(weights.dtype) * (0.0 if p == 1 else 1 / (1 - p)))
