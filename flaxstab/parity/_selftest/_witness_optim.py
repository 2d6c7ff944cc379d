"""Plain formulas of optimizers in PyTorch: the third opinion, in which no fault is planted."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)
EPS = 1e-8


def _optimizer(
    params: "list[torch.nn.Parameter] | list[dict[str, object]]",
    decay: float,
    step: "Callable[[torch.nn.Parameter, dict[str, torch.Tensor], float], None]",
) -> "torch.optim.Optimizer":
    """Returns an optimizer that steps each parameter alone, given its state and its decay."""
    import torch

    class Plain(torch.optim.Optimizer):
        def step(self) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        step(parameter, self.state[parameter], group["weight_decay"])

    return Plain(params, {"weight_decay": decay})


def adamw(
    params: "list[torch.nn.Parameter] | list[dict[str, object]]",
    peak: float,
    decay: float,
    *,
    amsgrad: bool = False,
    rate: Callable[[int], float] = lambda _: 1.0,
) -> "torch.optim.Optimizer":
    """Returns AdamW with its default betas and eps.

    Args:
      params: parameters, or groups of them with a ``weight_decay`` each.
      peak: the learning rate.
      decay: weight decay of parameters in no group.
      amsgrad: whether the largest second moment divides.
      rate: the factor of the learning rate, of the number of steps taken.
    """

    def step(theta: "torch.nn.Parameter", state: "dict[str, torch.Tensor]", decay: float) -> None:
        lr = peak * rate(int(state.get("step", 0)))
        direction = _direction(theta.grad, state, amsgrad)
        theta.data = theta * (1 - lr * decay) - lr * direction

    return _optimizer(params, decay, step)


def _direction(
    g: "torch.Tensor", state: "dict[str, torch.Tensor]", amsgrad: bool
) -> "torch.Tensor":
    """Returns Adam's corrected mean over its corrected root, and keeps the moments."""
    import torch

    if not state:
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
        state |= {name: torch.zeros_like(g) for name in names}
        state["step"] = torch.tensor(0.0)
    state["step"] = state["step"] + 1
    m = BETAS[0] * state["exp_avg"] + (1 - BETAS[0]) * g
    v = BETAS[1] * state["exp_avg_sq"] + (1 - BETAS[1]) * g**2
    state["exp_avg"], state["exp_avg_sq"] = m, v
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(v, state["max_exp_avg_sq"])
    first, second = (1 - beta ** int(state["step"]) for beta in BETAS)
    return (m / first) / (torch.sqrt(v / second) + EPS)


def adam(params: "list[torch.nn.Parameter]", lr: float, decay: float) -> "torch.optim.Optimizer":
    """Returns Adam that climbs, with L2, amsgrad and its default betas and eps."""

    def step(theta: "torch.nn.Parameter", state: "dict[str, torch.Tensor]", decay: float) -> None:
        theta.data = theta - lr * _direction(decay * theta - theta.grad, state, amsgrad=True)

    return _optimizer(params, decay, step)


def sgd(
    params: "list[torch.nn.Parameter]",
    lr: float,
    momentum: float,
    weight_decay: float,
    *,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> "torch.optim.Optimizer":
    """Returns stochastic gradient descent with momentum, all options as PyTorch's."""

    def step(theta: "torch.nn.Parameter", state: "dict[str, torch.Tensor]", decay: float) -> None:
        g = (-theta.grad if maximize else theta.grad) + decay * theta
        before = state.get("momentum_buffer")
        after = g if before is None else momentum * before + (1 - dampening) * g
        state["momentum_buffer"] = after
        theta.data = theta - lr * (g + momentum * after if nesterov else after)

    return _optimizer(params, weight_decay, step)


def clip(params: "list[torch.nn.Parameter]", max_norm: float) -> None:
    """Scales gradients so that their total norm is at most ``max_norm``."""
    norm = sum(float((p.grad.double() ** 2).sum()) for p in params) ** 0.5
    for parameter in params:
        parameter.grad = parameter.grad * min(1.0, max_norm / (norm + 1e-6))
