"""``torch_ref.training``: the printed loop, the meant one, early stopping and accumulation."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from parity_tests.support.torch_checks import SLACK, assert_close, draw
from torch_ref import optim, training
from torch_ref.norms import GhostBatchNorm

EPS = torch.finfo(torch.float64).eps
EPOCHS, STEPS = 4, 3


def _batches(count: int = STEPS, rows: int = 6, seed: int = 1) -> list[training.Batch]:
    x = draw(count, rows, 5, seed=seed)
    labels = (x[..., 0] > 3.0).long() + (x[..., 1] > 3.0).long()
    return list(zip(x, labels, strict=True))


def _model(norm: Callable[[int], nn.Module] = nn.LayerNorm, drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(5, 8), norm(8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


def _close(actual: float, expected: float, size: float = training.PEAK) -> bool:
    return abs(actual - expected) <= SLACK * EPS * size


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def test_after_the_warmup_the_printed_rate_stays_1_52_times_the_cosine_over_epochs() -> None:
    trace = training.learning_rate_trace(epochs=10, steps_per_epoch=120, warmup=500)
    # step 499 of 500 is the last to write; it lies in epoch 4, whose cosine it ignores
    excess = (499 / 500) / _cosine(4 / 10)
    assert round(excess, 2) == 1.52
    for step in range(499, 1200):
        intended = training.PEAK * _cosine(step // 120 / 10)
        assert _close(trace[step], excess * intended)


def test_the_printed_warmup_is_linear_from_step_1_and_never_reaches_the_peak() -> None:
    trace = training.learning_rate_trace(epochs=10, steps_per_epoch=120, warmup=500)
    assert all(_close(trace[n - 1], training.PEAK * n / 500) for n in range(1, 500))
    assert max(trace) == trace[498] == trace[499]
    assert _close(training.PEAK - max(trace), training.PEAK / 500)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warmup_the_printed_rate_is_the_cosine_over_epochs(warmup: int) -> None:
    trace = training.learning_rate_trace(epochs=6, steps_per_epoch=2, warmup=warmup)
    assert len(trace) == 12
    assert all(_close(lr, training.PEAK * _cosine(n // 2 / 6)) for n, lr in enumerate(trace))


def test_the_default_warmup_is_500_steps() -> None:
    assert training.learning_rate_trace(3, 200) == training.learning_rate_trace(3, 200, 500)


@pytest.mark.parametrize("warmup", [1, 5, 100])
def test_the_printed_loop_has_the_rates_of_the_trace(warmup: int) -> None:
    history = training.train_as_printed(_model(), _batches(), epochs=EPOCHS, warmup=warmup)
    trace = training.learning_rate_trace(EPOCHS, STEPS, warmup)
    assert history.learning_rates == trace
    assert len(history.losses) == EPOCHS * STEPS


def test_the_meant_rate_warms_up_to_the_peak_and_then_follows_a_cosine_over_steps() -> None:
    total, warmup = 50, 10
    rates = [training.warmup_cosine(n, warmup, total) for n in range(total)]
    assert all(_close(rates[n], training.PEAK * n / warmup) for n in range(warmup))
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=training.PEAK)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    for rate in rates[warmup:]:
        assert _close(rate, optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0
    assert rates[warmup] == training.PEAK
    assert rates[-1] > 0


def test_the_meant_rate_ends_at_the_end_and_stays_there() -> None:
    for count in (50, 51, 1000):
        assert training.warmup_cosine(count, 10, 50, peak=2.0, end=0.5) == 0.5
    assert training.warmup_cosine(30, 10, 50, peak=2.0, end=0.5) == 1.25
    assert training.warmup_cosine(0, 0, 50, peak=2.0) == 2.0
    assert training.warmup_cosine(7, 7, 7, peak=2.0) == 2.0


def test_the_meant_loop_has_the_meant_rates() -> None:
    history = training.train(_model(), _batches(), epochs=EPOCHS, warmup=5)
    total = EPOCHS * STEPS
    assert history.learning_rates == [training.warmup_cosine(n, 5, total) for n in range(total)]
    assert len(history.losses) == total


@pytest.mark.parametrize("loop", [training.train_as_printed, training.train])
def test_every_step_is_adamw_on_the_clipped_gradient_of_the_smoothed_loss(
    loop: Callable[..., training.History],
) -> None:
    batches, model, twin = _batches(), _model(), _model()
    history = loop(model, batches, epochs=1, warmup=10)
    states = [optim.AdamState.zero(theta) for theta in twin.parameters()]
    for n, (x, y) in enumerate(batches):
        twin.zero_grad()
        loss = F.cross_entropy(twin(x), y, label_smoothing=0.1)
        loss.backward()
        assert _close(history.losses[n], loss.item(), size=loss.item())
        norm = torch.stack([theta.grad.norm() for theta in twin.parameters()]).norm()
        scale = min(1.0, 1.0 / (norm.item() + 1e-6))  # 1e-6: torch's guard against a zero norm
        for index, theta in enumerate(twin.parameters()):
            # the printed loop counts its steps from 1
            count = n + 1 if loop is training.train_as_printed else n
            lr, decay = training.PEAK * count / 10, 0.05 * (theta.ndim > 1)
            after, states[index] = optim.adamw_step(
                theta.detach(), scale * theta.grad, states[index], lr, decay
            )
            theta.data = after
    for theta, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(theta.detach(), expected.detach(), expected.detach().abs().max())


def test_a_step_clips_the_gradient_norm_to_1() -> None:
    model = _model()
    with torch.no_grad():
        model[4].weight.mul_(100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = _batches()[0]
    training.train_step(model, optimizer, x, y)
    clipped = torch.stack([theta.grad.norm() for theta in model.parameters()]).norm()
    # torch divides by the norm plus 1e-6
    assert 1 - 1e-6 < clipped < 1


def test_a_step_returns_the_smoothed_loss_before_it_and_forgets_old_gradients() -> None:
    model = _model()
    x, y = _batches()[0]
    expected = F.cross_entropy(model(x), y, label_smoothing=0.1).item()
    for theta in model.parameters():
        theta.grad = torch.full_like(theta, 1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert training.train_step(model, optimizer, x, y) == expected
    assert max(theta.grad.abs().max() for theta in model.parameters()) <= 1


@pytest.mark.parametrize("loop", [training.train_as_printed, training.train])
def test_validation_is_in_evaluation_without_smoothing_and_training_goes_on(
    loop: Callable[..., training.History],
) -> None:
    model = _model(nn.BatchNorm1d, drop=0.5)
    validation = [*_batches(count=2, seed=7), *_batches(count=1, rows=2, seed=8)]
    history = loop(model, _batches(), validation, epochs=EPOCHS, warmup=2)
    assert len(history.validation_losses) == EPOCHS
    assert not model.training
    assert model[1].num_batches_tracked == EPOCHS * STEPS
    x, y = (torch.cat(parts) for parts in zip(*validation, strict=True))
    expected = F.cross_entropy(model(x), y).item()
    assert _close(history.validation_losses[-1], expected, size=10.0)
    silent = loop(model, _batches(), epochs=1, warmup=2)
    assert silent.validation_losses == []
    assert model.training


@pytest.mark.parametrize("loop", [training.train_as_printed, training.train])
def test_the_loop_learns(loop: Callable[..., training.History]) -> None:
    losses = loop(_model(), _batches(), epochs=60, warmup=5).losses
    assert sum(losses[-STEPS:]) < sum(losses[:STEPS])


def test_the_loops_default_to_100_epochs_and_a_warmup_of_500() -> None:
    batches = _batches(count=1, rows=2)
    printed = training.train_as_printed(_model(), batches).learning_rates
    meant = training.train(_model(), batches).learning_rates
    assert printed == training.learning_rate_trace(100, 1, 500)
    assert meant == [training.warmup_cosine(n, 500, 100) for n in range(100)]


class _Temperature(nn.Module):
    """A classifier with a 0-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _model()
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.temperature


def test_the_printed_loop_never_trains_a_0_d_parameter_and_the_meant_one_does() -> None:
    printed, meant = _Temperature(), _Temperature()
    training.train_as_printed(printed, _batches(), epochs=2, warmup=2)
    training.train(meant, _batches(), epochs=2, warmup=2)
    assert printed.temperature == 1
    assert meant.temperature != 1


@pytest.mark.parametrize(
    ("patience", "min_delta", "values", "stops"),
    [
        (1, 0.0, [3.0, 2.0, 2.0], [False, False, True]),
        (2, 0.0, [3.0, 3.5, 2.9, 3.0, 3.0], [False, False, False, False, True]),
        (2, 0.5, [3.0, 2.5, 2.4, 2.4], [False, False, False, False]),
        (2, 0.5, [3.0, 2.6, 2.5], [False, False, True]),
        (2, 0.0, [math.nan, math.nan], [False, True]),
        (2, 0.0, [3.0, math.nan, math.nan], [False, False, True]),
    ],
)
def test_early_stopping_counts_values_without_improvement(
    patience: int, min_delta: float, values: list[float], stops: list[bool]
) -> None:
    stopping = training.EarlyStopping(patience, min_delta)
    assert [stopping.update(value) for value in values] == stops


def test_early_stopping_remembers_the_best_and_needs_no_min_delta() -> None:
    stopping = training.EarlyStopping(3)
    for value in (3.0, 1.0, 2.0):
        stopping.update(value)
    assert (stopping.best, stopping.waited, stopping.min_delta) == (1.0, 1, 0.0)
    with pytest.raises(ValueError, match="at least 1, got 0; 1 stops"):
        training.EarlyStopping(0)


def _accumulated(model: nn.Module, batches: list[training.Batch]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = training.accumulate_gradients(model, batches)
    return loss, torch.cat([theta.grad.flatten() for theta in model.parameters()])


@pytest.mark.parametrize("sizes", [(6, 6), (9, 3), (4, 4, 4)])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_accumulation_enlarges_the_batch_but_not_for_batch_norm(
    norm: type[nn.Module], sizes: tuple[int, ...]
) -> None:
    x, y = _batches(count=1, rows=12)[0]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    loss, gradient = _accumulated(_model(norm), parts)
    whole_loss, whole = _accumulated(_model(norm), [(x, y)])
    if norm is nn.LayerNorm:
        assert _close(loss, whole_loss, size=10.0)
        assert_close(gradient, whole, x.abs().max() ** 2)
    else:
        assert abs(loss - whole_loss) > 1e-3
        assert (gradient - whole).abs().max() > 1e-3


def test_under_accumulation_batch_norm_is_ghost_batch_norm() -> None:
    x, y = _batches(count=1, rows=12)[0]
    plain, ghost = _model(nn.BatchNorm1d), _model(lambda features: GhostBatchNorm(features, 4))
    parts = list(zip(x.split(4), y.split(4), strict=True))
    loss, gradient = _accumulated(plain, parts)
    ghost_loss, expected = _accumulated(ghost, [(x, y)])
    assert _close(loss, ghost_loss, size=10.0)
    assert_close(gradient, expected, x.abs().max() ** 2)
    assert plain[1].num_batches_tracked == ghost[1].num_batches_tracked == 3
    assert_close(plain[1].running_mean, ghost[1].running_mean, x.abs().max())
    assert_close(plain[1].running_var, ghost[1].running_var, x.abs().max() ** 2)


def test_accumulation_adds_to_the_gradients_that_are_there() -> None:
    model, batches = _model(), _batches(count=2)
    _, first = _accumulated(model, batches)
    training.accumulate_gradients(model, batches)
    twice = torch.cat([theta.grad.flatten() for theta in model.parameters()])
    assert_close(twice, 2 * first, first.abs().max())
