"""``torch_ref.functional`` against ``torch.nn.functional`` in float64, and against closed forms."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from parity_tests.support.torch_checks import assert_close, draw, norm_magnitude
from torch_ref import functional

SHAPES = [(6, 4), (5, 4, 7), (3, 4, 5, 2), (2, 4, 3, 2, 5)]


def _affine(channels: int) -> tuple[Tensor, Tensor]:
    return draw(channels, seed=11, offset=1.0), draw(channels, seed=12)


def test_the_worked_example_is_normalised_as_torch_normalises_it() -> None:
    x = functional.WORKED_EXAMPLE
    layer = nn.BatchNorm1d(3)
    assert x.shape == (3, 3)
    assert_close(functional.batch_norm(x), layer(x).detach(), norm_magnitude(x, x.var(0)))


def test_the_worked_example_has_mean_0_and_variance_var_over_var_plus_eps() -> None:
    x = functional.WORKED_EXAMPLE.double()
    y = functional.batch_norm(x)
    variance = x.var(0, unbiased=False)
    assert_close(y.mean(0), torch.zeros(3, dtype=torch.float64), y.abs().max())
    assert_close(y.var(0, unbiased=False), variance / (variance + 1e-5))
    assert y.argmax(0).tolist() == x.argmax(0).tolist() == [1, 2, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_equals_torch_with_gamma_and_beta(shape: tuple[int, ...]) -> None:
    x, (weight, bias) = draw(*shape, seed=1), _affine(4)
    expected = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    variance = x.var([0, *range(2, x.ndim)], unbiased=False)
    size = norm_magnitude(x, variance, weight, bias)
    assert_close(functional.batch_norm(x, weight, bias, eps=1e-3), expected, size)
    plain = F.batch_norm(x, None, None, training=True)
    assert_close(functional.batch_norm(x), plain, norm_magnitude(x, variance))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_running_variance_is_the_unbiased_one(shape: tuple[int, ...]) -> None:
    x = draw(*shape, seed=1)
    mean, var = draw(4, seed=2), draw(4, seed=3).abs()
    running_mean, running_var = mean.clone(), var.clone()
    F.batch_norm(x, running_mean, running_var, training=True, momentum=0.3)
    new_mean, new_var = functional.updated_running_statistics(x, mean, var, 0.3)
    assert_close(new_mean, running_mean, x.abs().max())
    assert_close(new_var, running_var, x.abs().max() ** 2)
    biased = 0.7 * var + 0.3 * x.var([0, *range(2, x.ndim)], unbiased=False)
    with pytest.raises(AssertionError, match="above the bound"):
        assert_close(biased, running_var, x.abs().max() ** 2)


def test_momentum_defaults_to_torchs_0_1() -> None:
    x, layer = draw(5, 4, seed=1), nn.BatchNorm1d(4).double()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    layer(x)
    new_mean, new_var = functional.updated_running_statistics(x, mean, var)
    assert_close(new_mean, layer.running_mean, x.abs().max())
    assert_close(new_var, layer.running_var, x.abs().max() ** 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_normalises_in_evaluation_too(shape: tuple[int, ...]) -> None:
    x, (weight, bias) = draw(*shape, seed=1), _affine(4)
    mean, var = draw(4, seed=2), draw(4, seed=3).abs()
    y = functional.batch_norm_eval(x, mean, var, weight, bias)
    size = norm_magnitude(x.abs().max() + mean.abs().max(), var, weight, bias)
    assert_close(y, F.batch_norm(x, mean, var, weight, bias), size)
    assert (y - x).abs().max() > 1
    plain = functional.batch_norm_eval(x, mean, var)
    assert_close(plain, F.batch_norm(x, mean, var), size)


def test_synchronised_moments_are_those_of_the_whole_batch_also_for_unequal_parts() -> None:
    parts = [draw(2, 4, 3, seed=1), draw(7, 4, 3, seed=2, offset=-5.0), draw(1, 4, 3, seed=3)]
    whole = torch.cat(parts)
    mean, var = functional.synchronised_moments(parts)
    assert_close(mean, whole.mean((0, 2)), whole.abs().max())
    assert_close(var, whole.var((0, 2), unbiased=False), whole.abs().max() ** 2)
    unweighted = torch.stack([part.mean((0, 2)) for part in parts]).mean(0)
    assert (unweighted - mean).abs().min() > 1


def test_layer_norm_is_over_the_features_of_one_token() -> None:
    x, (weight, bias) = draw(3, 5, 8, seed=1), _affine(8)
    y = functional.layer_norm(x, (8,), weight, bias)
    size = norm_magnitude(x, x.var(-1), weight, bias)
    assert_close(y, F.layer_norm(x, (8,), weight, bias), size)
    changed = x.clone()
    changed[:, 1:] = 0.0
    assert torch.equal(functional.layer_norm(changed, (8,), weight, bias)[:, 0], y[:, 0])
    over_the_sequence = functional.layer_norm(x, (5, 8))
    assert_close(over_the_sequence, F.layer_norm(x, (5, 8)), x.abs().max())
    assert (functional.layer_norm(x, (8,)) - over_the_sequence).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_equals_torch(shape: tuple[int, ...], groups: int) -> None:
    x, (weight, bias) = draw(*shape, seed=1), _affine(4)
    expected = F.group_norm(x, groups, weight, bias)
    variance = x.reshape(len(x), groups, -1).var(-1, unbiased=False)
    size = norm_magnitude(x, variance, weight, bias)
    assert_close(functional.group_norm(x, groups, weight, bias), expected, size)
    plain = F.group_norm(x, groups)
    assert_close(functional.group_norm(x, groups), plain, norm_magnitude(x, variance))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_instance_norm_equals_torch(shape: tuple[int, ...]) -> None:
    x, (weight, bias) = draw(*shape, seed=1), _affine(4)
    expected = F.instance_norm(x, weight=weight, bias=bias)
    size = norm_magnitude(x, x.flatten(2).var(-1, unbiased=False), weight, bias)
    assert_close(functional.instance_norm(x, weight, bias), expected, size)


def test_one_group_is_layer_norm_and_c_groups_are_instance_norm() -> None:
    x = draw(3, 4, 5, 6, seed=1) + draw(1, 4, 1, 1, seed=2, scale=20.0)
    instance = functional.instance_norm(x)
    size = norm_magnitude(x, x.flatten(2).var(-1))
    assert_close(functional.group_norm(x, 1), functional.layer_norm(x, (4, 5, 6)), size)
    assert_close(functional.group_norm(x, 4), instance, size)
    assert (functional.group_norm(x, 1) - instance).abs().max() > 1


def test_normalisation_keeps_a_sample_apart_from_the_batch_except_batch_norm() -> None:
    x = draw(3, 4, 5, 6, seed=1)
    changed = torch.cat([x[:1], 7 * x[1:]])
    for alone in (
        functional.instance_norm,
        lambda x: functional.group_norm(x, 2),
        lambda x: functional.layer_norm(x, (4, 5, 6)),
    ):
        assert torch.equal(alone(x)[0], alone(changed)[0])
    assert (functional.batch_norm(x)[0] - functional.batch_norm(changed)[0]).abs().max() > 0.1


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_inverted_dropout_is_torchs_with_torchs_mask(p: float) -> None:
    h = draw(50, 40, seed=1)
    torch.manual_seed(5)
    expected = F.dropout(h, p)
    torch.manual_seed(5)
    mask = torch.empty_like(h).bernoulli_(1 - p) if p > 0 else torch.ones_like(h)
    assert torch.equal(functional.inverted_dropout(h, mask, p), expected)


def test_inverted_dropout_keeps_the_mean() -> None:
    h, p = draw(4, seed=1), 0.3
    mean = torch.zeros_like(h)
    for kept in itertools.product((0.0, 1.0), repeat=4):
        mask = torch.tensor(kept, dtype=h.dtype)
        chance = (1 - p) ** mask.sum() * p ** (4 - mask.sum())
        mean += chance * functional.inverted_dropout(h, mask, p)
    assert_close(mean, h, h.abs().max())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_and_its_gradient_equal_torch(smoothing: float) -> None:
    labels = torch.tensor([0, 4, 2, 2, 1, 4])
    ours, theirs = (draw(6, 5, seed=1, scale=9.0).requires_grad_() for _ in range(2))
    loss = functional.cross_entropy(ours, labels, smoothing)
    expected = F.cross_entropy(theirs, labels, label_smoothing=smoothing)
    assert_close(loss.detach(), expected.detach(), ours.detach().abs().max())
    loss.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad)


def test_cross_entropy_does_not_smooth_by_default() -> None:
    logits, labels = draw(6, 5, seed=1), torch.tensor([0, 4, 2, 2, 1, 4])
    expected = F.cross_entropy(logits, labels)
    assert_close(functional.cross_entropy(logits, labels), expected, logits.abs().max())


def test_penalties_are_sum_of_absolutes_and_half_the_squares() -> None:
    theta = [torch.tensor([[3.0, -4.0]]), torch.tensor(-2.0)]
    assert functional.l1_penalty(theta) == 9.0
    assert functional.l2_penalty(theta) == 14.5


def test_the_gradient_lambda_theta_belongs_to_half_the_square() -> None:
    theta = draw(3, 4, seed=1).requires_grad_()
    (half,) = torch.autograd.grad(0.1 * functional.l2_penalty([theta]), theta)
    (as_printed,) = torch.autograd.grad(0.1 * (theta**2).sum(), theta)
    size = theta.detach().abs().max()
    assert_close(half, 0.1 * theta.detach(), size)
    assert_close(as_printed, 2 * 0.1 * theta.detach(), size)


def test_the_gradient_of_l1_is_the_sign() -> None:
    theta = draw(3, 4, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(functional.l1_penalty([theta]), theta)
    assert torch.equal(grad, theta.detach().sign())
