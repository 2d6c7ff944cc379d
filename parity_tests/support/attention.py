"""Attention's formula in PyTorch, with explicit probabilities, and both frameworks' layers."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import Tensor

from flaxstab import interop
from flaxstab.attention import MultiHeadAttention
from parity_tests.support.cases import values

N, L, S, H, E, EV = 2, 5, 6, 3, 4, 2
SHAPES = {"query": (N, L, H, E), "key": (N, S, H, E), "value": (N, S, H, EV)}


def arrays(scale: float = 1.0) -> list[np.ndarray]:
    """Query, key and value, neither centred nor so large that one key takes all."""
    return [
        values(*shape, seed=i, offset=0.7, scale=scale) for i, shape in enumerate(SHAPES.values())
    ]


def logits_bias(options: Mapping[str, object]) -> Tensor:
    """What PyTorch adds to the logits for these options, in float64."""
    several = lambda a: a if isinstance(a, tuple | list) else [] if a is None else [a]  # noqa: E731
    total = torch.zeros(1, 1, L, S, dtype=torch.float64)
    for bias in several(options.get("bias")):
        total = total + torch.tensor(bias)
    for mask in several(options.get("mask")):
        total = total.masked_fill(torch.tensor(mask), -torch.inf)
    if options.get("is_causal"):
        total = total.masked_fill(~torch.ones(L, S, dtype=torch.bool).tril(), -torch.inf)
    return total


def plain(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """The formula, for output and probabilities under a dropout mask."""
    logits = torch.einsum("nqhe,nkhe->nhqk", q, k) * options.get("scale", q.shape[-1] ** -0.5)
    weights = torch.softmax(logits + logits_bias(options) if options else logits, -1)
    if "p" in options:
        p = options["p"]
        weights = weights * torch.tensor(options["dropout_mask"]) * (0 if p == 1 else 1 / (1 - p))
    return torch.einsum("nhqk,nkhe->nqhe", weights, v), weights


class Options(NamedTuple):
    """What a layer is built with: all but the last are PyTorch's own options.

    Attributes:
      bias: of the projections.
      bias_kv: whether a learned key and value follow the others.
      zero_attn: whether a key and a value of zeros follow them.
      cross: whether key and value have features of their own, 5 and 6 instead of 4.
    """

    bias: bool
    bias_kv: bool
    zero_attn: bool
    cross: bool

    def __str__(self) -> str:
        chosen = [name for name, value in self._asdict().items() if value]
        return ", ".join(chosen) or "nothing"


def loaded(options: Options) -> tuple[torch.nn.MultiheadAttention, MultiHeadAttention]:
    """Both layers in float64 with the same random parameters; PyTorch's batch first or not."""
    sizes = {"kdim": 5, "vdim": 6} if options.cross else {}
    chosen = (options.bias, options.bias_kv, options.zero_attn)
    batch_first = options.bias_kv
    theirs = torch.nn.MultiheadAttention(4, 2, 0.0, *chosen, batch_first=batch_first, **sizes)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        theirs.double()
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(rng.normal(0.2, 0.5, parameter.shape)))
    with jax.enable_x64(True):
        ours = MultiHeadAttention(
            4, 2, 0.0, *chosen, **sizes, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        interop.load_state_dict(ours, theirs.state_dict())
    return theirs, ours
