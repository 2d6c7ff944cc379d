"""Plain formulas of optimizers in PyTorch: the third opinion, in which no fault is planted."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)
EPS = 1e-8


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
    import torch

    class Plain(torch.optim.Optimizer):
        def step(self) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        self._step(parameter, group["weight_decay"])

        def _step(self, theta: "torch.nn.Parameter", decay: float) -> None:
            state = self.state[theta]
            if not state:
                names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
                state |= {name: torch.zeros_like(theta) for name in names}
                state["step"] = torch.tensor(0.0)
            lr = peak * rate(int(state["step"]))
            state["step"] = state["step"] + 1
            m = BETAS[0] * state["exp_avg"] + (1 - BETAS[0]) * theta.grad
            v = BETAS[1] * state["exp_avg_sq"] + (1 - BETAS[1]) * theta.grad**2
            state["exp_avg"], state["exp_avg_sq"] = m, v
            if amsgrad:
                v = state["max_exp_avg_sq"] = torch.maximum(v, state["max_exp_avg_sq"])
            first, second = (1 - beta ** int(state["step"]) for beta in BETAS)
            direction = (m / first) / (torch.sqrt(v / second) + EPS)
            theta.data = theta * (1 - lr * decay) - lr * direction

    return Plain(params, {"weight_decay": decay})


def clip(params: "list[torch.nn.Parameter]", max_norm: float) -> None:
    """Scales gradients so that their total norm is at most ``max_norm``."""
    norm = sum(float((p.grad.double() ** 2).sum()) for p in params) ** 0.5
    for parameter in params:
        parameter.grad = parameter.grad * min(1.0, max_norm / (norm + 1e-6))
