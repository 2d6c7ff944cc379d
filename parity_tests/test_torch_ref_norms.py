"""``torch_ref.norms``: ghost and frozen batch normalisation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from parity_tests.support.torch_checks import assert_close, draw, norm_magnitude
from torch_ref.functional import updated_running_statistics
from torch_ref.norms import FrozenBatchNorm, GhostBatchNorm


def _ghost(virtual: int, **arguments: object) -> GhostBatchNorm:
    layer = GhostBatchNorm(4, virtual, **arguments).double()
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(draw(4, seed=11, offset=1.0))
            layer.bias.copy_(draw(4, seed=12))
    return layer


def _trained_batch_norm(**arguments: object) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4, **arguments).double()
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(draw(4, seed=11, offset=1.0))
            layer.bias.copy_(draw(4, seed=12))
    layer(draw(6, 4, 3, 2, seed=13))
    return layer


@pytest.mark.parametrize(
    ("rows", "virtual", "sizes"),
    [(33, 32, [17, 16]), (64, 32, [32, 32]), (9, 4, [3, 3, 3]), (5, 8, [5])],
)
def test_ghost_batches_are_chunks_that_differ_by_no_leftover(
    rows: int, virtual: int, sizes: list[int]
) -> None:
    x, layer = draw(rows, 4, 3, seed=1), _ghost(virtual)
    y = layer(x).detach()
    start = 0
    for size in sizes:
        part = x[start : start + size]
        expected = F.batch_norm(part, None, None, layer.weight, layer.bias, training=True)
        bound = norm_magnitude(part, part.var((0, 2)), layer.weight, layer.bias)
        assert_close(y[start : start + size], expected.detach(), bound)
        start += size
    assert start == rows
    assert layer.num_batches_tracked == len(sizes)


def test_ghost_chunks_update_the_running_statistics_one_after_the_other() -> None:
    x, layer = draw(33, 4, seed=1), _ghost(32)
    layer(x)
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    for part in (x[:17], x[17:]):
        mean, var = updated_running_statistics(part, mean, var, 0.1)
    assert_close(layer.running_mean, mean, x.abs().max())
    assert_close(layer.running_var, var, x.abs().max() ** 2)


def test_ghost_without_momentum_averages_all_chunks_so_far() -> None:
    x, layer = draw(24, 4, seed=1), _ghost(8, momentum=None)
    for batch in (x[:16], x[16:]):
        layer(batch)
    parts = x.chunk(3)
    assert layer.num_batches_tracked == 3
    assert_close(layer.running_mean, x.mean(0), x.abs().max())
    variances = torch.stack([part.var(0) for part in parts])
    assert_close(layer.running_var, variances.mean(0), x.abs().max() ** 2)


def test_ghost_evaluation_uses_the_running_statistics_and_no_chunks() -> None:
    x, layer = draw(33, 4, seed=1), _ghost(32)
    layer(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer.eval()(x[:5]).detach()
    expected = F.batch_norm(x[:5], layer.running_mean, layer.running_var, layer.weight, layer.bias)
    assert torch.equal(y, expected.detach())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer(x[:1]).shape == (1, 4)


@pytest.mark.parametrize("affine", [True, False])
def test_ghost_of_the_whole_batch_is_batch_norm_in_every_buffer(affine: bool) -> None:
    torch.manual_seed(0)
    ghost, plain = _ghost(6, affine=affine), nn.BatchNorm2d(4, affine=affine).double()
    plain.load_state_dict(ghost.state_dict())
    x = draw(6, 4, 3, 2, seed=1)
    assert torch.equal(ghost(x), plain(x))
    assert list(ghost.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(ghost.state_dict()[name], value)
    assert torch.equal(ghost.eval()(x), plain.eval()(x))


def test_ghost_starts_as_batch_norm_starts() -> None:
    ghost, plain = GhostBatchNorm(4, 8).state_dict(), nn.BatchNorm1d(4).state_dict()
    assert all(torch.equal(ghost[name], plain[name]) for name in plain)


def test_ghost_raises_where_a_chunk_has_one_value_per_channel() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        _ghost(2)(draw(5, 4, seed=1))


def test_ghost_needs_a_positive_virtual_batch() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0; use 32"):
        GhostBatchNorm(4, 0)


def test_frozen_equals_batch_norm_in_evaluation_and_passes_gradients() -> None:
    norm = _trained_batch_norm()
    frozen = FrozenBatchNorm.from_batch_norm(norm)
    x = draw(3, 4, 5, 2, seed=1).requires_grad_()
    cotangent = draw(3, 4, 5, 2, seed=2)
    y, expected = frozen(x), norm.eval()(x)
    size = norm_magnitude(x, norm.running_var, norm.weight, norm.bias)
    assert_close(y.detach(), expected.detach(), size)
    (ours,) = torch.autograd.grad(y, x, cotangent)
    (theirs,) = torch.autograd.grad(expected, x, cotangent)
    assert_close(ours, theirs, norm_magnitude(cotangent, norm.running_var, norm.weight))


def test_frozen_has_no_parameters_and_train_does_not_undo_it() -> None:
    norm = _trained_batch_norm()
    frozen = FrozenBatchNorm.from_batch_norm(norm).train()
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    x = draw(3, 4, 5, 2, seed=1)
    y = frozen(x)
    assert list(frozen.parameters()) == []
    assert sorted(before) == ["bias", "running_mean", "running_var", "weight"]
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert torch.equal(frozen.eval()(x), y)


def test_frozen_is_a_copy() -> None:
    norm = _trained_batch_norm()
    frozen = FrozenBatchNorm.from_batch_norm(norm)
    before = frozen.running_mean.clone()
    norm(draw(6, 4, 3, 2, seed=5))
    assert torch.equal(frozen.running_mean, before)
    assert not torch.equal(norm.running_mean, before)


def test_frozen_works_without_affine_parameters_and_keeps_eps() -> None:
    norm = _trained_batch_norm(affine=False, eps=0.5)
    x = draw(3, 4, 5, 2, seed=1)
    frozen = FrozenBatchNorm.from_batch_norm(norm)
    assert frozen.eps == 0.5
    assert_close(frozen(x), norm.eval()(x), x.abs().max())


def test_a_fresh_frozen_norm_divides_by_the_root_of_one_plus_eps() -> None:
    x = draw(3, 4, 5, 2, seed=1)
    frozen = FrozenBatchNorm(4).double()
    assert_close(frozen(x), x / (1 + torch.tensor(1e-5, dtype=x.dtype)).sqrt(), x.abs().max())


@pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], ids=lambda make: make.__name__
)
def test_freezing_without_running_statistics_is_refused(make: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"needs running statistics, got .*=False; build it with"):
        FrozenBatchNorm.from_batch_norm(make(4, track_running_stats=False))
