"""The pairs of attention layers that faults are planted in."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from flaxstab._typing import Array
from flaxstab.attention import MultiHeadAttention
from flaxstab.parity._selftest import _witness as witness
from flaxstab.parity._selftest._cases import DROP, drawn, normal
from flaxstab.parity._selftest._plant import Build, Sides

if TYPE_CHECKING:
    import torch

SIZE, HEADS, QUERIES = 8, 2, 3
_KEYS = 255  # for XLA's CPU compiler, which is slow on dropout masks with short rows


class _Attending(nnx.Module):
    """Attends from a sequence to another, with an attention mask or causality."""

    def __init__(self, p: float, is_causal: bool) -> None:
        self.attn = MultiHeadAttention(SIZE, HEADS, p, rngs=nnx.Rngs(0))
        self.is_causal = is_causal

    def __call__(self, x: Array, memory: Array, *masks: Array) -> object:
        mask = masks[0] if masks else None
        return self.attn(x, memory, attn_mask=mask, is_causal=self.is_causal)


def _classes(p: float, is_causal: bool) -> "tuple[type[torch.nn.Module], type[torch.nn.Module]]":
    """Returns PyTorch's twin of ``_Attending`` and its plain formula."""
    import torch

    class Attending(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(SIZE, HEADS, p, batch_first=True)

        def mask(self, keys: int, *masks: "torch.Tensor") -> "torch.Tensor":
            if not is_causal:
                return masks[0]
            return torch.ones(QUERIES, keys, dtype=torch.bool).triu(1)

        def forward(self, *given: "torch.Tensor") -> "torch.Tensor":
            x, memory, *masks = given
            mask = self.mask(memory.shape[1], *masks)
            options = {"attn_mask": mask, "is_causal": is_causal, "need_weights": False}
            return self.attn(x, memory, memory, **options)[0]

    class Formula(torch.nn.MultiheadAttention):
        def forward(self, *given: "torch.Tensor") -> "torch.Tensor":
            return witness.attention(self, *given)

    class Plain(Attending):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Formula(SIZE, HEADS, p)

        def forward(self, *given: "torch.Tensor") -> "torch.Tensor":
            x, memory, *masks = given
            return self.attn(x, memory, self.mask(memory.shape[1], *masks))

    return Attending, Plain


def _attention(
    memory: np.ndarray, *masks: np.ndarray, p: float = 0.0, is_causal: bool = False
) -> Callable[[], Sides]:
    x = normal(len(memory), QUERIES, SIZE, seed=1, offset=0.5, scale=1.0)

    def theirs() -> "torch.nn.Module":
        import torch

        module = drawn(_classes(p, is_causal)[0]())
        with torch.no_grad():
            for parameter in module.parameters():  # or one key would take all
                parameter.mul_(0.3)
        return module

    inputs = (x, memory, *masks)
    return Build(
        lambda: _Attending(p, is_causal), theirs, inputs, lambda _: _classes(p, is_causal)[1]()
    )


def attention() -> dict[str, Callable[[], Sides]]:
    """Returns the cases of attention, each a function that builds its sides."""
    rng = np.random.default_rng(3)
    of_heads = rng.uniform(size=(2 * HEADS, QUERIES, 5)) < 0.4
    of_heads[:, 0], of_heads[1, 0] = False, True  # one head of one query sees nothing
    added = rng.normal(size=(QUERIES, _KEYS)) * (rng.uniform(size=(QUERIES, _KEYS)) < 0.5)
    few, many = (normal(n, s, SIZE, offset=0.5, scale=1.0) for n, s in ((2, 5), (1, _KEYS)))
    return {
        "attention": _attention(few, of_heads),
        "attention, causal": _attention(few, is_causal=True),
        "attention, dropout": _attention(many, added, p=DROP),
    }
