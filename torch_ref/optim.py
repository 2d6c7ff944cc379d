"""Weight decay: document 2, F and M-2."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ParamGroup = dict[str, list[nn.Parameter] | float]


def _groups(
    decayed: list[nn.Parameter], others: list[nn.Parameter], weight_decay: float
) -> list[ParamGroup]:
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def decay_groups(model: nn.Module, weight_decay: float = 0.05) -> list[ParamGroup]:
    """Two parameter groups, without decay on biases and norms (document 2, F-2, as printed).

    The rule goes by rank and name: 1-D parameters and names that end in "bias" are not decayed. It
    therefore decays what it cannot recognise: 0-D parameters, and the gamma of a ``LayerNorm`` over
    several axes.

    Args:
        model: The model.
        weight_decay: Decay of the first group.

    Returns:
        The decayed group and the group without decay, for any ``torch.optim`` optimizer.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, theta in model.named_parameters():
        (others if theta.ndim == 1 or name.endswith("bias") else decayed).append(theta)
    return _groups(decayed, others, weight_decay)


def mini_project_groups_as_printed(
    model: nn.Module, weight_decay: float = 0.05
) -> list[ParamGroup]:
    """The mini project's groups with their two holes (document 2, M-2, as printed).

    A 0-D parameter falls in neither group and is never trained; a parameter of two or more axes
    named "...bias" falls in both, and torch raises. :func:`mini_project_groups` is what is meant.
    """
    named = list(model.named_parameters())
    decayed = [theta for _, theta in named if theta.ndim > 1]
    others = [theta for name, theta in named if theta.ndim == 1 or name.endswith("bias")]
    return _groups(decayed, others, weight_decay)


def mini_project_groups(model: nn.Module, weight_decay: float = 0.05) -> list[ParamGroup]:
    """The mini project's groups as meant: every parameter in exactly one (document 2, M-2).

    Decayed are the parameters of two or more axes that are no biases; all others, 0-D included, are
    not. The document's own rule is :func:`mini_project_groups_as_printed`.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, theta in model.named_parameters():
        (decayed if theta.ndim > 1 and not name.endswith("bias") else others).append(theta)
    return _groups(decayed, others, weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """Moments of Adam and the number of steps taken; make the first with :meth:`zero`."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int

    @classmethod
    def zero(cls, theta: Tensor) -> "AdamState":
        """State before the first step."""
        return cls(exp_avg=torch.zeros_like(theta), exp_avg_sq=torch.zeros_like(theta), step=0)


def adam_direction(
    grad: Tensor,
    state: AdamState,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, AdamState]:
    """Adam's m_hat / (sqrt(v_hat) + eps) and the next state (document 2, F-1)."""
    step = state.step + 1
    exp_avg = betas[0] * state.exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * state.exp_avg_sq + (1 - betas[1]) * grad**2
    m_hat = exp_avg / (1 - betas[0] ** step)
    v_hat = exp_avg_sq / (1 - betas[1] ** step)
    after = AdamState(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step)
    return m_hat / (torch.sqrt(v_hat) + eps), after


def adamw_step(
    theta: Tensor,
    grad: Tensor,
    state: AdamState,
    lr: float = 3e-4,
    weight_decay: float = 0.05,
) -> tuple[Tensor, AdamState]:
    """One step of AdamW in torch's order: decay, then the Adam step (document 2, F-1).

    The document writes the decay after the step (:func:`adamw_step_as_printed`).

    Args:
        theta: The parameter.
        grad: Its gradient.
        state: State before the step.
        lr: Learning rate.
        weight_decay: lambda; the parameter shrinks by ``1 - lr * lambda``.

    Returns:
        The new parameter and the new state.
    """
    direction, after = adam_direction(grad, state)
    return theta * (1 - lr * weight_decay) - lr * direction, after


def adamw_step_as_printed(
    theta: Tensor,
    grad: Tensor,
    state: AdamState,
    lr: float = 3e-4,
    weight_decay: float = 0.05,
) -> tuple[Tensor, AdamState]:
    """One step of AdamW with the decay last (document 2, F-1 and L, as printed).

    It also shrinks the step: one step differs from torch's by ``lr * weight_decay`` times the Adam
    step. Arguments and result as :func:`adamw_step`.
    """
    direction, after = adam_direction(grad, state)
    return (theta - lr * direction) * (1 - lr * weight_decay), after


def adam_l2_step(
    theta: Tensor,
    grad: Tensor,
    state: AdamState,
    lr: float = 3e-4,
    weight_decay: float = 0.05,
) -> tuple[Tensor, AdamState]:
    """One step of Adam with L2: lambda * theta joins the gradient (document 2, F-1).

    The decay passes through the moments, so that parameters with large gradients are decayed less;
    that is what AdamW avoids. Arguments and result as :func:`adamw_step`.
    """
    direction, after = adam_direction(grad + weight_decay * theta, state)
    return theta - lr * direction, after


def sgd_l2_step(theta: Tensor, grad: Tensor, lr: float, weight_decay: float = 0.0) -> Tensor:
    """One step of plain SGD with L2; the same as decay by ``1 - lr * weight_decay`` (F-1)."""
    return theta - lr * (grad + weight_decay * theta)
