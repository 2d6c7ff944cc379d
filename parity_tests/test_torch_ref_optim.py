"""``torch_ref.optim``: parameter groups and single steps against ``torch.optim`` in float64."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parity_tests.support.torch_checks import assert_close, draw
from torch_ref import optim
from torch_ref.blocks import TransformerBlock
from torch_ref.models import CNN_BN, StableCNN

Groups = Callable[[nn.Module], list[optim.ParamGroup]]
STEPS = 10


class Odd(nn.Module):
    """A weight, a 0-D parameter and a matrix that is named a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(2, 3, seed=1))
        self.temperature = nn.Parameter(draw(seed=2))
        self.table_bias = nn.Parameter(draw(2, 3, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x + self.table_bias).sum() * self.temperature


def _names(model: nn.Module, groups: list[optim.ParamGroup]) -> list[list[str]]:
    found = []
    for group in groups:
        members = {id(theta) for theta in group["params"]}
        found.append([name for name, theta in model.named_parameters() if id(theta) in members])
    return found


@pytest.mark.parametrize("groups", [optim.decay_groups, optim.mini_project_groups])
@pytest.mark.parametrize(
    "make", [CNN_BN, StableCNN, lambda: TransformerBlock(16), Odd], ids=["bn", "m", "t", "odd"]
)
def test_every_parameter_is_in_exactly_one_group(
    groups: Groups, make: Callable[[], nn.Module]
) -> None:
    model = make()
    decayed, others = _names(model, groups(model))
    assert sorted(decayed + others) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("groups", [optim.decay_groups, optim.mini_project_groups])
def test_biases_and_norms_are_not_decayed_and_weights_are(groups: Groups) -> None:
    model = TransformerBlock(16)
    made = groups(model)
    decayed, others = _names(model, made)
    assert [group["weight_decay"] for group in made] == [0.05, 0.0]
    assert decayed == ["attn.in_proj_weight", "attn.out_proj.weight", "ff.0.weight", "ff.3.weight"]
    assert {"ln1.weight", "ln1.bias", "ln2.weight", "attn.in_proj_bias"} <= set(others)


def test_the_decay_is_an_argument() -> None:
    for groups in (
        optim.decay_groups,
        optim.mini_project_groups,
        optim.mini_project_groups_as_printed,
    ):
        assert groups(nn.Linear(2, 3), weight_decay=0.2)[0]["weight_decay"] == 0.2


def test_the_rule_by_rank_decays_0_d_parameters_and_norms_over_several_axes() -> None:
    model = Odd()
    assert _names(model, optim.decay_groups(model)) == [["weight", "temperature"], ["table_bias"]]
    norm = nn.LayerNorm((4, 5))
    assert _names(norm, optim.decay_groups(norm)) == [["weight"], ["bias"]]


def test_the_meant_groups_decay_no_0_d_parameter_and_no_bias() -> None:
    model = Odd()
    meant = _names(model, optim.mini_project_groups(model))
    assert meant == [["weight"], ["temperature", "table_bias"]]


def test_the_printed_groups_lose_0_d_parameters_and_double_2_d_biases() -> None:
    model = Odd()
    printed = _names(model, optim.mini_project_groups_as_printed(model))
    assert printed == [["weight", "table_bias"], ["table_bias"]]
    with pytest.raises(ValueError, match="more than one parameter group"):
        torch.optim.AdamW(optim.mini_project_groups_as_printed(model))


@pytest.mark.parametrize("meant", [False, True])
def test_the_printed_groups_never_train_a_0_d_parameter(meant: bool) -> None:
    model = Odd()
    del model.table_bias
    model.table_bias = 0.0
    groups = optim.mini_project_groups if meant else optim.mini_project_groups_as_printed
    before = model.temperature.item(), model.weight.detach().clone()
    optimizer = torch.optim.AdamW(groups(model), lr=0.1)
    model(draw(2, 3, seed=4)).backward()
    optimizer.step()
    assert not torch.equal(model.weight.detach(), before[1])
    assert (model.temperature.item() != before[0]) == meant


def test_the_groups_agree_where_there_is_nothing_odd() -> None:
    model = StableCNN()
    expected = _names(model, optim.decay_groups(model))
    assert _names(model, optim.mini_project_groups(model)) == expected
    assert _names(model, optim.mini_project_groups_as_printed(model)) == expected


def _gradients(shape: tuple[int, ...] = (3, 4)) -> list[Tensor]:
    return [draw(*shape, seed=20 + step, offset=0.5) for step in range(STEPS)]


def _torch_run(make: Callable[..., torch.optim.Optimizer]) -> tuple[Tensor, dict[str, Tensor]]:
    theta = nn.Parameter(draw(3, 4, seed=1))
    optimizer = make([theta])
    for grad in _gradients():
        theta.grad = grad
        optimizer.step()
    return theta.detach(), optimizer.state[theta]


@pytest.mark.parametrize(
    ("step", "optimizer"),
    [(optim.adamw_step, torch.optim.AdamW), (optim.adam_l2_step, torch.optim.Adam)],
)
def test_ten_steps_and_their_moments_equal_torch(
    step: Callable[..., tuple[Tensor, optim.AdamState]],
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    theta = draw(3, 4, seed=1)
    state = optim.AdamState.zero(theta)
    for grad in _gradients():
        theta, state = step(theta, grad, state, lr=0.1, weight_decay=0.3)
    make = functools.partial(optimizer, lr=0.1, weight_decay=0.3)
    expected, moments = _torch_run(make)
    size = max(expected.abs().max(), *(grad.abs().max() for grad in _gradients()))
    assert_close(theta, expected, size)
    assert_close(state.exp_avg, moments["exp_avg"], size)
    assert_close(state.exp_avg_sq, moments["exp_avg_sq"], size**2)
    assert state.step == moments["step"] == STEPS


def test_the_defaults_are_the_documents() -> None:
    theta, grad = draw(3, 4, seed=1), draw(3, 4, seed=2)
    state = optim.AdamState.zero(theta)
    for step in (optim.adamw_step, optim.adamw_step_as_printed, optim.adam_l2_step):
        ours, _ = step(theta, grad, state)
        named, _ = step(theta, grad, state, lr=3e-4, weight_decay=0.05)
        assert torch.equal(ours, named)


def test_the_printed_order_differs_by_lr_times_decay_times_the_step() -> None:
    theta, lr, decay = draw(3, 4, seed=1), 0.1, 0.3
    state = optim.AdamState.zero(theta)
    for grad in _gradients():
        direction, _ = optim.adam_direction(grad, state)
        printed, after = optim.adamw_step_as_printed(theta, grad, state, lr, decay)
        torchs, same = optim.adamw_step(theta, grad, state, lr, decay)
        assert torch.equal(after.exp_avg, same.exp_avg)
        assert torch.equal(after.exp_avg_sq, same.exp_avg_sq)
        assert_close(printed - torchs, lr * decay * (lr * direction), theta.abs().max())
        assert (printed - torchs).abs().max() > 0.5 * lr**2 * decay
        theta, state = torchs, same


def test_without_decay_both_orders_and_l2_are_adam() -> None:
    theta, grad = draw(3, 4, seed=1), draw(3, 4, seed=2)
    state = optim.AdamState.zero(theta)
    expected, _ = optim.adamw_step(theta, grad, state, weight_decay=0.0)
    for step in (optim.adamw_step_as_printed, optim.adam_l2_step):
        assert torch.equal(step(theta, grad, state, weight_decay=0.0)[0], expected)


def test_sgd_with_l2_equals_torch_and_is_decay_by_1_minus_lr_lambda() -> None:
    theta = draw(3, 4, seed=1)
    for grad in _gradients():
        decayed = (1 - 0.1 * 0.3) * theta - 0.1 * grad
        theta = optim.sgd_l2_step(theta, grad, lr=0.1, weight_decay=0.3)
        assert_close(theta, decayed, decayed.abs().max())
    expected, _ = _torch_run(functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.3))
    assert_close(theta, expected, max(grad.abs().max() for grad in _gradients()))


def _shrinkage(step: Callable[..., tuple[Tensor, optim.AdamState]], size: float) -> float:
    """How much lower theta = 1 ends because of the decay, under gradients of that size."""
    ends = []
    for weight_decay in (0.0, 0.1):
        theta = torch.ones((), dtype=torch.float64)
        state = optim.AdamState.zero(theta)
        for count in range(STEPS):
            grad = torch.full_like(theta, size * (-1) ** count)
            theta, state = step(theta, grad, state, lr=0.01, weight_decay=weight_decay)
        ends.append(theta.item())
    return ends[0] - ends[1]


def test_l2_in_adam_decays_large_gradients_less_and_adamw_does_not() -> None:
    assert _shrinkage(optim.adam_l2_step, 100.0) < 0.1 * _shrinkage(optim.adam_l2_step, 1.0)
    assert _shrinkage(optim.adamw_step, 100.0) > 0.9 * _shrinkage(optim.adamw_step, 1.0) > 0
