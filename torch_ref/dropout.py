"""Where dropout goes: document 2, E-2."""

import math

import torch
from torch import Tensor, nn

from torch_ref.functional import inverted_dropout


def _check_probability(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(
            f"p must be a probability of dropping, 0 to 1, got p={p}; use 0.1 to drop one in ten."
        )


def channel_dropout(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Drop whole channels, as ``nn.Dropout2d`` does, with a given mask (document 2, I-1).

    Args:
        x: ``(N, C, *space)``.
        mask: ``(N, C)``, 1 where kept.
        p: Probability of dropping.

    Returns:
        The masked and scaled input.
    """
    mask = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))  # (N, C) -> (N, C, 1, ..., 1)
    return inverted_dropout(x, mask, p)


def alpha_dropout(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Drop to SELU's lower limit and keep mean 0, variance 1, as ``nn.AlphaDropout``, given a mask.

    Klambauer, Unterthiner, Mayr, Hochreiter: Self-normalizing neural networks, 2017,
    arXiv 1706.02515.

    Args:
        x: Any shape.
        mask: 1 where kept, 0 where dropped; broadcasts against ``x``.
        p: Probability of dropping, 0 to 1; at 1 everything is 0.

    Returns:
        The masked input, scaled and shifted.
    """
    if p == 1.0:
        return x * 0
    alpha = 1.7580993408473766
    scale = 1 / math.sqrt((1 - p) * (1 + p * alpha**2))
    return scale * (x * mask - alpha * (1 - mask) + alpha * p)


class DropPath(nn.Module):
    """Drop whole samples of a residual branch: stochastic depth.

    Huang, Sun, Liu, Sedra, Weinberger: Deep networks with stochastic depth, 2016, arXiv 1603.09382.
    As ``torchvision.ops.StochasticDepth(p, "row")`` and timm's ``DropPath(p)``.

    Args:
        p: Probability of dropping, 0 to 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        _check_probability(p)
        self.p = p

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Drop samples of ``(N, ...)``; evaluation is the identity.

        Args:
            x: ``(N, ...)``.
            mask: ``(N,)``, 1 where kept, to use instead of drawing one.

        Returns:
            The masked and scaled input.
        """
        if not self.training:
            return x
        mask = x.new_empty(x.shape[0]).bernoulli_(1.0 - self.p) if mask is None else mask
        return inverted_dropout(x, mask.reshape(-1, *[1] * (x.ndim - 1)), self.p)


class RecurrentDropout(nn.Module):
    """Dropout with one mask per sequence, the same at every time step (document 2, E-2).

    Gal, Ghahramani: A theoretically grounded application of dropout in recurrent neural networks,
    2016, arXiv 1512.05287.

    Args:
        p: Probability of dropping, 0 to 1.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        _check_probability(p)
        self.p = p

    def sample_mask(self, like: Tensor, features: int) -> Tensor:
        """Draw a mask ``(N, features)`` of 1 (kept) and 0 in the dtype and device of ``like``."""
        return like.new_empty(like.shape[0], features).bernoulli_(1.0 - self.p)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Drop features of ``(N, T, C)`` for the whole sequence; evaluation is the identity.

        Args:
            x: ``(N, T, C)``.
            mask: ``(N, C)`` to use instead of drawing one.

        Returns:
            The masked and scaled sequence.
        """
        if not self.training:
            return x
        mask = self.sample_mask(x, x.shape[-1]) if mask is None else mask
        return inverted_dropout(x, mask[:, None], self.p)  # (N, C) -> (N, 1, C)


class VariationalLSTM(nn.Module):
    """One LSTM layer, batch first, with one mask on its inputs and one on its hidden state.

    Document 2, E-2 calls fresh dropout on the recurrent connection unstable and names recurrent
    dropout: here h is masked with the same mask before every step; the cell state is not masked. In
    evaluation it is ``nn.LSTM(batch_first=True)``.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        p: Probability of dropping, 0 to 1.
    """

    def __init__(self, input_size: int, hidden_size: int, p: float = 0.5) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(input_size, hidden_size)
        self.drop = RecurrentDropout(p)

    def forward(
        self, x: Tensor, input_mask: Tensor | None = None, hidden_mask: Tensor | None = None
    ) -> Tensor:
        """Run over the sequence from a zero state.

        Args:
            x: ``(N, T, input_size)``.
            input_mask: ``(N, input_size)`` to use instead of drawing one.
            hidden_mask: ``(N, hidden_size)`` to use instead of drawing one.

        Returns:
            The unmasked hidden states, ``(N, T, hidden_size)``.
        """
        h = c = x.new_zeros(x.shape[0], self.cell.hidden_size)
        x = self.drop(x, input_mask)
        if hidden_mask is None:
            hidden_mask = self.drop.sample_mask(h, self.cell.hidden_size)
        outputs = []
        for x_t in x.unbind(1):
            h_in = inverted_dropout(h, hidden_mask, self.drop.p) if self.training else h
            h, c = self.cell(x_t, (h_in, c))
            outputs.append(h)
        return torch.stack(outputs, 1)


def feed_forward(d: int = 512, hidden: int = 2048, p: float = 0.1) -> nn.Sequential:
    """Feed-forward part of a Transformer, dropout behind the activation and the output (E-2)."""
    return nn.Sequential(
        nn.Linear(d, hidden), nn.GELU(), nn.Dropout(p), nn.Linear(hidden, d), nn.Dropout(p)
    )


def norm_act_dropout(norm: nn.Module, act: nn.Module, p: float) -> nn.Sequential:
    """Norm, activation, dropout, in the order of document 2, E-2 and J.

    In this order the running statistics of the norm do not see the random mask.

    Args:
        norm: The normalisation layer.
        act: The activation.
        p: Probability of dropping, 0 to 1.

    Returns:
        The three in a ``Sequential``.
    """
    return nn.Sequential(norm, act, nn.Dropout(p))
