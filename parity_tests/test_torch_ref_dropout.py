"""``torch_ref.dropout``: masks of the right shape in the right place."""

import pytest
import torch
from torch import Tensor, nn

from parity_tests.support.torch_checks import assert_close, draw
from torch_ref import dropout


@pytest.mark.parametrize("space", [(7,), (5, 3), (2, 3, 4)])
def test_channel_dropout_is_torchs_dropout_nd_with_torchs_mask(space: tuple[int, ...]) -> None:
    layer = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(space) - 1](0.3)
    x = draw(6, 20, *space, seed=1)
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    mask = x.new_empty(6, 20).bernoulli_(0.7)
    assert torch.equal(dropout.channel_dropout(x, mask, 0.3), expected)
    assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_alpha_dropout_is_torchs_with_torchs_mask(p: float) -> None:
    x = draw(50, 40, seed=1)
    torch.manual_seed(5)
    expected = nn.AlphaDropout(p)(x)
    torch.manual_seed(5)
    mask = torch.empty_like(x).bernoulli_(1 - p)
    assert_close(dropout.alpha_dropout(x, mask, p), expected, 2 * x.abs().max())


def test_drop_path_drops_whole_samples_and_scales_the_others() -> None:
    torch.manual_seed(0)
    x = draw(60, 5, 4, seed=1)
    y = dropout.DropPath(0.4)(x)
    dropped = (y == 0).all((1, 2))
    assert torch.equal(dropped, (y == 0).any((1, 2)))
    assert 0 < dropped.sum() < 60
    assert_close(y[~dropped], x[~dropped] / 0.6, x.abs().max() / 0.6)


def test_drop_path_takes_a_mask_and_draws_one_of_its_probability() -> None:
    # n = 40,000: the bound is 6 standard errors of a Bernoulli mean
    layer, x = dropout.DropPath(0.2), draw(3, 2, seed=1)
    mask = torch.tensor([1, 0, 1], dtype=x.dtype)
    assert_close(layer(x, mask), x * mask[:, None] / 0.8, x.abs().max() / 0.8)
    torch.manual_seed(0)
    kept = layer(torch.ones(40_000)) != 0
    assert abs(kept.double().mean().item() - 0.8) < 6 * (0.2 * 0.8 / kept.numel()) ** 0.5


@pytest.mark.parametrize("layer", [dropout.DropPath, dropout.RecurrentDropout])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_a_layer_is_the_identity_in_evaluation_and_at_p_0(
    layer: type[dropout.DropPath | dropout.RecurrentDropout], p: float
) -> None:
    drop, x = layer(p), draw(2, 3, 4, seed=1)
    trained = drop(x)
    assert torch.equal(drop.eval()(x), x)
    if p == 0.0:
        assert torch.equal(trained, x)
    if p == 1.0:
        assert torch.equal(trained, torch.zeros_like(x))


def test_recurrent_dropout_drops_the_same_features_at_every_step() -> None:
    torch.manual_seed(0)
    x = draw(8, 5, 16, seed=1)
    y = dropout.RecurrentDropout(0.4)(x)
    dropped = y == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert not torch.equal(dropped[0], dropped[1])
    assert_close(y[~dropped], x[~dropped] / 0.6, x.abs().max() / 0.6)


def test_recurrent_dropout_takes_a_mask_and_draws_one_of_its_probability() -> None:
    # n = 40,000: the bound is 6 standard errors of a Bernoulli mean
    layer, x = dropout.RecurrentDropout(0.2), draw(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]], dtype=x.dtype)
    assert_close(layer(x, mask), x * mask[:, None] / 0.8, x.abs().max() / 0.8)
    torch.manual_seed(0)
    drawn = layer.sample_mask(draw(200, 1, seed=1), 200)
    assert drawn.shape == (200, 200)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.8) < 6 * (0.2 * 0.8 / drawn.numel()) ** 0.5


@pytest.mark.parametrize("layer", [dropout.DropPath, dropout.RecurrentDropout])
@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_probability_outside_0_and_1_is_refused(
    layer: type[dropout.DropPath | dropout.RecurrentDropout], p: float
) -> None:
    with pytest.raises(ValueError, match=f"0 to 1, got p={p}; use"):
        layer(p)


def _lstm_with_masks(
    cell: nn.LSTMCell, x: Tensor, input_mask: Tensor, hidden_mask: Tensor
) -> Tensor:
    """The recurrence by its equations; both masks are scaled already."""
    h = c = torch.zeros(len(x), cell.hidden_size, dtype=x.dtype)
    outputs = []
    for step in range(x.shape[1]):
        gates = (x[:, step] * input_mask) @ cell.weight_ih.T + cell.bias_ih
        gates = gates + (h * hidden_mask) @ cell.weight_hh.T + cell.bias_hh
        i, f, g, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1).detach()


def test_the_variational_lstm_masks_inputs_and_hidden_state_with_one_mask_each() -> None:
    torch.manual_seed(0)
    layer, x = dropout.VariationalLSTM(3, 5, p=0.25).double(), draw(2, 6, 3, seed=1)
    masks = [x.new_empty(2, n).bernoulli_(0.75) for n in (3, 5)]
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    expected = _lstm_with_masks(layer.cell, x, *(mask / 0.75 for mask in masks))
    assert_close(layer(x, *masks).detach(), expected, x.abs().max() / 0.75)


def test_the_variational_lstm_draws_the_input_mask_then_the_hidden_mask() -> None:
    torch.manual_seed(0)
    layer, x = dropout.VariationalLSTM(3, 5).double(), draw(2, 6, 3, seed=1)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    masks = [x.new_empty(2, n).bernoulli_(0.5) for n in (3, 5)]
    assert torch.equal(y, layer(x, *masks))


@pytest.mark.parametrize("mode", ["evaluation", "p=0"])
def test_without_dropout_the_variational_lstm_is_nn_lstm(mode: str) -> None:
    layer = dropout.VariationalLSTM(3, 5, p=0.0 if mode == "p=0" else 0.5).double()
    layer.train(mode == "p=0")
    lstm = nn.LSTM(3, 5, batch_first=True).double()
    cell = layer.cell.state_dict()
    lstm.load_state_dict({f"{name}_l0": value for name, value in cell.items()})
    x = draw(2, 6, 3, seed=1)
    assert_close(layer(x).detach(), lstm(x)[0].detach(), x.abs().max())


def test_the_feed_forward_part_is_the_documents_by_default() -> None:
    ff = dropout.feed_forward()
    assert [type(layer) for layer in ff] == [
        nn.Linear,
        nn.GELU,
        nn.Dropout,
        nn.Linear,
        nn.Dropout,
    ]
    assert ff[0].weight.shape == (2048, 512)
    assert ff[3].weight.shape == (512, 2048)
    assert ff[2].p == ff[4].p == 0.1
    assert ff[1].approximate == "none"
    assert ff[0].bias is not None


def _running_statistics(block: nn.Sequential, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    block.train()(x)
    return torch.stack([norm.running_mean, norm.running_var])


def test_behind_the_norm_dropout_does_not_reach_the_running_statistics() -> None:
    x = draw(64, 4, seed=1)
    without = nn.BatchNorm1d(4).double()
    without(x)
    expected = torch.stack([without.running_mean, without.running_var])
    norm = nn.BatchNorm1d(4).double()
    block = dropout.norm_act_dropout(norm, nn.ReLU(), 0.5)
    assert [type(layer) for layer in block] == [nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert torch.equal(_running_statistics(block, norm, x), expected)
    norm = nn.BatchNorm1d(4).double()
    reversed_order = nn.Sequential(nn.Dropout(0.5), norm, nn.ReLU())
    assert (_running_statistics(reversed_order, norm, x)[1] > expected[1]).all()
