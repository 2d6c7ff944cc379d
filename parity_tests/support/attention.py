"""Attention's formula in PyTorch, with explicit logits and probabilities, and what it is fed."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

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
