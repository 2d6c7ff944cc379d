"""``torch_ref.surgery``: what the document prints, what it means, and where they part."""

import pytest
import torch
from torch import Tensor, nn

from parity_tests.support.torch_checks import assert_close, draw, norm_magnitude
from torch_ref import surgery
from torch_ref.blocks import BasicBlock, Bottleneck, PreActBottleneck, PreActResBlock
from torch_ref.functional import layer_norm
from torch_ref.models import CNN_BN
from torch_ref.norms import FrozenBatchNorm

Moments = list[Tensor]


def _image(channels: int = 4, seed: int = 1) -> Tensor:
    return draw(3, channels, 6, 5, seed=seed, offset=0.5)


def _post() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, stride=2)).double()


def _pre() -> PreActResBlock:
    torch.manual_seed(0)
    return PreActResBlock(4, 4, groups=2).double()


def _train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        (y * draw(*y.shape, seed=9)).mean().backward()
        optimizer.step()


def _gammas(model: nn.Module) -> dict[str, bool]:
    norms = (nn.BatchNorm2d, nn.GroupNorm)
    found = {n: m.weight for n, m in model.named_modules() if isinstance(m, norms)}
    return {name: bool((weight == 0).all()) for name, weight in found.items()}


def test_the_printed_function_zeroes_every_batch_norm() -> None:
    model = _post()
    surgery.zero_last_bn_gamma_as_printed(model)
    assert len(_gammas(model)) == 5
    assert all(_gammas(model).values())


def test_the_printed_function_makes_a_projecting_block_return_0() -> None:
    model = _post()
    surgery.zero_last_bn_gamma_as_printed(model)
    assert torch.equal(model(_image()), torch.zeros(3, 8, 3, 3, dtype=torch.float64))


def test_the_printed_function_passes_over_norms_without_gamma() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))
    surgery.zero_last_bn_gamma_as_printed(model)
    assert torch.equal(model[1].weight, torch.zeros(4))


def test_only_the_last_norm_of_each_post_activation_branch_is_zeroed() -> None:
    model = _post()
    assert surgery.zero_last_bn_gamma(model) == ["0.bn2", "1.bn2"]
    zeroed = [name for name, zero in _gammas(model).items() if zero]
    assert zeroed == ["0.bn2", "1.bn2"]
    assert surgery.zero_last_bn_gamma(model[0]) == ["bn2"]


def test_a_zeroed_post_activation_block_is_relu_of_its_skip_and_trains() -> None:
    block, x = _post()[0], _image()
    surgery.zero_last_bn_gamma(block)
    assert torch.equal(block(x), x.relu())
    _train(block, x)
    assert block.bn2.weight.abs().min() > 0
    assert (block(x) - x.relu()).abs().max() > 0


def test_a_pre_activation_block_is_left_alone_by_the_gamma_rule() -> None:
    block = _pre()
    before = [theta.clone() for theta in block.parameters()]
    assert surgery.zero_last_bn_gamma(block) == []
    assert all(map(torch.equal, before, block.parameters()))


def test_zero_gamma_before_relu_never_trains() -> None:
    block, x = _pre(), _image()
    with torch.no_grad():
        block.norm2.weight.zero_()
    _train(block, x, steps=5)
    assert torch.equal(block(x), x)
    assert all(torch.equal(theta.grad, torch.zeros_like(theta)) for theta in block.parameters())


def test_a_zeroed_last_convolution_is_the_identity_and_trains() -> None:
    model = nn.Sequential(_pre(), nn.Sequential(_pre()))
    x = _image()
    assert surgery.zero_last_convolution(model) == ["0.conv2", "1.0.conv2"]
    assert not any(_gammas(model).values())
    assert torch.equal(model(x), x)
    _train(model, x)
    assert all(theta.grad.abs().max() > 0 for theta in model.parameters())
    assert surgery.zero_last_convolution(_post()) == []


def test_bottlenecks_have_their_third_norm_or_convolution_zeroed() -> None:
    model = nn.Sequential(Bottleneck(8, 2), PreActBottleneck(8, 2)).double()
    assert surgery.zero_last_bn_gamma(model) == ["0.bn3"]
    assert surgery.zero_last_convolution(model) == ["1.conv3"]
    x = draw(3, 8, 5, 4, seed=1, offset=0.0)
    assert torch.equal(model(x), x.relu())
    _train(model, x)
    assert all(weight.abs().max() > 0 for weight in (model[0].bn3.weight, model[1].conv3.weight))


def _running_means(model: nn.Module) -> Moments:
    norms = (nn.BatchNorm2d, FrozenBatchNorm)
    return [m.running_mean.clone() for m in model.modules() if isinstance(m, norms)]


def test_the_printed_freeze_holds_until_train_is_called() -> None:
    model, x = CNN_BN().double(), draw(2, 3, 4, 4, seed=1)
    before = _running_means(model)
    model.apply(surgery.set_bn_eval)
    model(x)
    assert all(map(torch.equal, before, _running_means(model)))
    assert not model.net[1].weight.requires_grad
    assert not model.net[1].bias.requires_grad
    model.train()
    model(x)
    assert not any(map(torch.equal, before, _running_means(model)))


def test_the_printed_freeze_fails_without_affine_parameters() -> None:
    with pytest.raises(AttributeError, match="requires_grad_"):
        nn.Sequential(nn.BatchNorm1d(4, affine=False)).apply(surgery.set_bn_eval)


def test_the_frozen_model_stays_frozen_in_training_and_computes_as_in_evaluation() -> None:
    model, x = CNN_BN().double(), draw(2, 3, 4, 4, seed=1)
    model(x)
    expected = model.eval()(x).detach()
    frozen = surgery.freeze_batch_norm(model).train()
    before = _running_means(frozen)
    y = frozen(x).detach()
    assert frozen is model
    assert [type(layer) for layer in frozen.net[1::3]] == [FrozenBatchNorm, FrozenBatchNorm]
    assert all(map(torch.equal, before, _running_means(frozen)))
    assert_close(y, expected, expected.abs().max())
    assert len(list(frozen.parameters())) == 2


def test_freezing_works_without_affine_parameters_at_the_root_and_on_shared_norms() -> None:
    frozen = surgery.freeze_batch_norm(nn.BatchNorm1d(4, affine=False))
    assert type(frozen) is FrozenBatchNorm
    shared = nn.BatchNorm1d(4)
    model = surgery.freeze_batch_norm(nn.Sequential(shared, nn.ReLU(), shared))
    assert type(model[0]) is FrozenBatchNorm
    assert model[0] is model[2]


def test_freezing_without_running_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="needs running statistics"):
        surgery.freeze_batch_norm(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))


def test_replacing_keeps_the_mode_of_each_norm() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].eval()
    frozen = surgery.freeze_batch_norm(model)
    assert [layer.training for layer in frozen] == [True, False]


def test_sync_conversion_keeps_parameters_state_and_evaluation() -> None:
    model, x = CNN_BN().double(), draw(2, 3, 4, 4, seed=1)
    model(x)
    names = list(model.state_dict())
    parameters = list(model.parameters())
    expected = model.eval()(x)
    sync = surgery.convert_sync_batch_norm(model)
    assert [type(layer) for layer in sync.net[1::3]] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert list(sync.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, sync.parameters(), strict=True))
    assert torch.equal(sync.eval()(x), expected)


def test_sync_training_without_a_process_group_is_batch_norm() -> None:
    x, plain = draw(5, 4, seed=1), nn.BatchNorm1d(4).double()
    sync = surgery.convert_sync_batch_norm(nn.Sequential(nn.BatchNorm1d(4))).double()
    assert torch.equal(sync(x), plain(x))
    assert torch.equal(sync[0].running_var, plain.running_var)


def test_replacing_by_one_group_normalises_over_channels_and_space_of_a_sample() -> None:
    norm = nn.BatchNorm2d(4, eps=0.25).double()
    with torch.no_grad():
        norm.weight.copy_(draw(4, seed=11))
        norm.bias.copy_(draw(4, seed=12))
    x = _image()
    new = surgery.replace_batch_norm(nn.Sequential(norm), groups=1)[0]
    plain = layer_norm(x, (4, 6, 5), eps=0.25)
    expected = plain * norm.weight[:, None, None] + norm.bias[:, None, None]
    size = norm_magnitude(x, x.flatten(1).var(1), norm.weight, norm.bias)
    assert_close(new(x).detach(), expected.detach(), size)
    assert new.weight is norm.weight
    assert new.bias is norm.bias


def test_replacing_uses_32_groups_and_keeps_a_missing_affine_missing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(64), nn.Sequential(nn.BatchNorm1d(64, affine=False)))
    surgery.replace_batch_norm(model)
    first, second = model[0], model[1][0]
    assert type(first) is type(second) is nn.GroupNorm
    assert first.num_groups == second.num_groups == 32
    assert second.weight is None
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    with pytest.raises(ValueError, match="divisible"):
        surgery.replace_batch_norm(nn.Sequential(nn.BatchNorm2d(20)))
