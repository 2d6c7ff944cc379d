"""``torch_ref.blocks`` against the documents' formulas, written with functions only."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from parity_tests.support.torch_checks import assert_close, draw, norm_magnitude
from torch_ref.blocks import (
    Add,
    BasicBlock,
    Bottleneck,
    PreActBottleneck,
    PreActResBlock,
    TransformerBlock,
    scaled_residual,
)
from torch_ref.dropout import channel_dropout
from torch_ref.functional import batch_norm, group_norm, layer_norm


def _randomise_affine(model: nn.Module) -> None:
    """Give 1-D parameters values that a wrong wiring would show."""
    with torch.no_grad():
        for index, theta in enumerate(model.parameters()):
            if theta.ndim == 1:
                theta.copy_(draw(len(theta), seed=100 + index, offset=1.0, scale=0.5))


def _size(*terms: Tensor) -> float:
    return sum(float(term.detach().abs().max()) for term in terms)


def test_scaled_residual_adds_a_tenth_by_default() -> None:
    x, branch = draw(2, 3, seed=1), draw(2, 3, seed=2)
    assert torch.equal(scaled_residual(x, branch), x + 0.1 * branch)
    assert torch.equal(scaled_residual(x, branch, scale=0.5), x + 0.5 * branch)


def test_a_branch_is_scaled_per_channel_too() -> None:
    x, branch, gamma = draw(2, 3, 4, 5, seed=1), draw(2, 3, 4, 5, seed=2), draw(3, seed=3)
    add = Add(0.1, 0.5, 3).double()
    assert torch.equal(add.gamma.detach(), torch.full((3,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        add.gamma.copy_(gamma)
    assert torch.equal(add(x, branch).detach(), x + 0.1 * (branch * gamma[:, None, None]))
    assert not [*Add().parameters()]
    assert torch.equal(Add()(x, branch), x + branch)


@pytest.mark.parametrize("projects", ["raw", "activated"])
@pytest.mark.parametrize(("out_ch", "stride"), [(4, 1), (8, 1), (4, 2), (8, 2)])
def test_the_pre_activation_block_is_its_formula(out_ch: int, stride: int, projects: str) -> None:
    torch.manual_seed(0)
    block = PreActResBlock(4, out_ch, groups=2, stride=stride, projects=projects).double()
    _randomise_affine(block)
    x = draw(3, 4, 7, 6, seed=1)
    activated = group_norm(x, 2, block.norm1.weight, block.norm1.bias).relu()
    h = F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
    g = group_norm(h, 2, block.norm2.weight, block.norm2.bias).relu()
    branch = F.conv2d(g, block.conv2.weight, padding=1)
    plain = out_ch == 4 and stride == 1
    seen = x if projects == "raw" else activated
    skip = x if plain else F.conv2d(seen, block.skip.weight, stride=stride)
    y = block(x)
    assert y.shape == (3, out_ch, math.ceil(7 / stride), math.ceil(6 / stride))
    assert isinstance(block.skip, nn.Identity) == plain
    assert_close(y.detach(), (branch + skip).detach(), _size(h, branch, skip) * x.abs().max())


def test_the_pre_activation_block_has_32_groups_and_no_biases_in_convolutions() -> None:
    block = PreActResBlock(32, 64)
    assert block.norm1.num_groups == block.norm2.num_groups == 32
    assert block.drop.p == 0.0
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 3
    assert all(conv.bias is None for conv in convolutions)


def test_dropout_of_the_pre_activation_block_is_by_channel_and_spares_the_skip() -> None:
    torch.manual_seed(0)
    block = PreActResBlock(4, 4, groups=2, drop=0.5).double()
    x = draw(3, 4, 7, 6, seed=1)
    branch = block.eval()(x) - x
    torch.manual_seed(3)
    y = block.train()(x)
    torch.manual_seed(3)
    mask = x.new_empty(3, 4).bernoulli_(0.5)
    assert 0 < mask.sum() < mask.numel()
    expected = channel_dropout(branch, mask, 0.5) + x
    assert_close(y.detach(), expected.detach(), _size(branch, x) * 2)


_TWO = [(64, 32, 3, 3), (64, 64, 3, 3), (64, 32, 1, 1)]
_THREE = [(16, 32, 1, 1), (16, 16, 3, 3), (64, 16, 1, 1), (64, 32, 1, 1)]


@pytest.mark.parametrize(
    ("block", "size", "shapes"),
    [
        (PreActResBlock, 64, _TWO),
        (BasicBlock, 64, _TWO),
        (Bottleneck, 16, _THREE),
        (PreActBottleneck, 16, _THREE),
    ],
)
def test_residual_blocks_start_with_kaiming_normal_kernels(
    block: type[nn.Module], size: int, shapes: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    model = block(32, size)
    torch.manual_seed(0)
    for shape in shapes:  # what the constructors of the convolutions draw
        nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    expected = [nn.init.kaiming_normal_(torch.empty(s), nonlinearity="relu") for s in shapes]
    kernels = [theta for theta in model.parameters() if theta.ndim == 4]
    assert all(map(torch.equal, kernels, expected))
    assert len(kernels) == len(shapes)
    torch.manual_seed(0)
    plain = block(32, size, init=lambda _: None)
    torch.manual_seed(0)
    assert torch.equal(plain.conv1.weight, nn.Conv2d(32, *shapes[0][::2], bias=False).weight)


@pytest.mark.parametrize(("out_ch", "stride"), [(4, 1), (8, 1), (8, 2)])
def test_the_post_activation_block_is_its_formula(out_ch: int, stride: int) -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, out_ch, stride).double()
    _randomise_affine(block)
    x = draw(3, 4, 7, 6, seed=1)
    first = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
    h = batch_norm(first, block.bn1.weight, block.bn1.bias).relu()
    second = F.conv2d(h, block.conv2.weight, padding=1)
    branch = batch_norm(second, block.bn2.weight, block.bn2.bias)
    skip = x
    if stride != 1 or out_ch != 4:
        conv, norm = block.downsample
        skip = batch_norm(F.conv2d(x, conv.weight, stride=stride), norm.weight, norm.bias)
    y = block(x)
    assert y.shape == (3, out_ch, math.ceil(7 / stride), math.ceil(6 / stride))
    assert_close(y.detach(), (branch + skip).relu().detach(), _size(first, second, branch, skip))


def _convolved_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, stride: int = 1) -> Tensor:
    h = F.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2)
    return batch_norm(h, norm.weight, norm.bias)


@pytest.mark.parametrize(("in_ch", "stride"), [(8, 1), (4, 1), (8, 2)])
def test_the_bottleneck_is_its_formula(in_ch: int, stride: int) -> None:
    torch.manual_seed(0)
    block = Bottleneck(in_ch, 2, stride).double()
    _randomise_affine(block)
    x = draw(3, in_ch, 7, 6, seed=1)
    first = _convolved_norm(x, block.conv1, block.bn1).relu()
    second = _convolved_norm(first, block.conv2, block.bn2, stride).relu()
    branch = _convolved_norm(second, block.conv3, block.bn3)
    same = stride == 1 and in_ch == 8
    skip = x if same else _convolved_norm(x, *block.downsample, stride)
    y = block(x)
    assert y.shape == (3, 8, math.ceil(7 / stride), math.ceil(6 / stride))
    # Small variances behind a 1x1 convolution of few channels amplify what came before.
    size = _size(first, second, branch, skip) * x.abs().max()
    assert_close(y.detach(), (branch + skip).relu().detach(), size)


@pytest.mark.parametrize("projects", ["raw", "activated"])
@pytest.mark.parametrize(("in_ch", "stride"), [(8, 1), (4, 1), (8, 2)])
def test_the_pre_activation_bottleneck_is_its_formula(
    in_ch: int, stride: int, projects: str
) -> None:
    torch.manual_seed(0)
    block = PreActBottleneck(in_ch, 2, stride, projects=projects).double()
    _randomise_affine(block)
    x = draw(3, in_ch, 7, 6, seed=1)
    activated = batch_norm(x, block.norm1.weight, block.norm1.bias).relu()
    first = _convolved_norm(activated, block.conv1, block.norm2).relu()
    second = _convolved_norm(first, block.conv2, block.norm3, stride).relu()
    branch = F.conv2d(second, block.conv3.weight)
    seen = x if projects == "raw" else activated
    same = stride == 1 and in_ch == 8
    skip = x if same else F.conv2d(seen, block.skip.weight, stride=stride)
    y = block(x)
    assert y.shape == (3, 8, math.ceil(7 / stride), math.ceil(6 / stride))
    size = _size(first, second, branch, skip) * x.abs().max()
    assert_close(y.detach(), (branch + skip).detach(), size)


def test_an_unknown_place_of_the_projection_is_refused() -> None:
    for make in (PreActResBlock, PreActBottleneck):
        with pytest.raises(ValueError, match="must be 'raw' or 'activated', got projects='norm'"):
            make(4, 4, 2, projects="norm")


def test_dropout_of_the_pre_activation_bottleneck_is_by_channel() -> None:
    torch.manual_seed(0)
    block = PreActBottleneck(8, 2, drop=0.5).double()
    x = draw(3, 8, 5, 4, seed=1)
    dropped = (block(x) == x).all((2, 3))
    assert 0 < dropped.sum() < dropped.numel()


def test_the_pre_activation_block_keeps_the_skip_and_the_post_activation_block_cuts_it() -> None:
    x = draw(3, 4, 6, 5, seed=1, offset=0.0)
    pre, post = PreActResBlock(4, 4, groups=2).double(), BasicBlock(4, 4).double()
    with torch.no_grad():
        pre.conv2.weight.zero_()
        post.bn2.weight.zero_()
    assert torch.equal(pre(x), x)
    assert torch.equal(post(x), x.relu())
    assert x.min() < 0


def test_a_bias_before_batch_norm_changes_nothing_and_has_no_gradient() -> None:
    conv, norm = nn.Conv2d(4, 6, 3).double(), nn.BatchNorm2d(6).double()
    x = draw(3, 4, 6, 5, seed=1)
    convolved = conv(x)
    y = norm(convolved)
    cotangent = draw(*y.shape, seed=2)
    (grad,) = torch.autograd.grad(y, conv.bias, cotangent)
    with torch.no_grad():
        conv.bias.add_(draw(6, seed=3))
    variance = convolved.detach().var((0, 2, 3))
    size = norm_magnitude(convolved, variance) + norm_magnitude(conv.bias, variance)
    assert_close(norm(conv(x)).detach(), y.detach(), size)
    assert_close(grad, torch.zeros_like(grad), cotangent.abs().sum() * size)


def test_residual_blocks_have_no_bias_before_batch_norm() -> None:
    block = BasicBlock(4, 8, 2)
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))


def _attention(h: Tensor, attn: nn.MultiheadAttention, added: Tensor) -> Tensor:
    """Scaled dot-product attention by its formula; ``added`` broadcasts against the logits."""
    n, length, d = h.shape
    projected = h @ attn.in_proj_weight.T + attn.in_proj_bias
    # (N, L, 3 d) -> 3 times (N, H, L, d / H)
    q, k, v = projected.reshape(n, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + added
    mixed = torch.softmax(logits, -1) @ v
    return attn.out_proj(mixed.transpose(1, 2).reshape(n, length, d))


def _transformer() -> TransformerBlock:
    torch.manual_seed(0)
    block = TransformerBlock(16, nhead=4).double().eval()
    _randomise_affine(block)
    return block


def _by_formula(block: TransformerBlock, x: Tensor, added: Tensor) -> Tensor:
    h = layer_norm(x, (16,), block.ln1.weight, block.ln1.bias)
    x = x + _attention(h, block.attn, added)
    h = layer_norm(x, (16,), block.ln2.weight, block.ln2.bias)
    h = F.linear(h, block.ff[0].weight, block.ff[0].bias)
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return x + F.linear(h, block.ff[3].weight, block.ff[3].bias)


def _float_mask(ignore: Tensor) -> Tensor:
    zeros = torch.zeros(ignore.shape, dtype=torch.float64)
    return zeros.masked_fill(ignore, -torch.inf)


def test_the_transformer_block_is_pre_ln_attention_and_exact_gelu() -> None:
    block, x = _transformer(), draw(3, 5, 16, seed=1)
    expected = _by_formula(block, x, torch.zeros((), dtype=x.dtype)).detach()
    assert_close(block(x).detach(), expected, 16 * expected.abs().max())


@pytest.mark.parametrize("form", ["bool", "float"])
def test_true_in_a_mask_is_ignored_and_floats_are_added(form: str) -> None:
    block, x = _transformer(), draw(3, 5, 16, seed=1)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    expected = _by_formula(
        block, x, _float_mask(causal) + _float_mask(padding)[:, None, None]
    ).detach()
    masks = (causal, padding)
    if form == "float":
        masks = (_float_mask(causal), _float_mask(padding))
    y = block(x, attn_mask=masks[0], key_padding_mask=masks[1]).detach()
    assert_close(y, expected, 16 * expected.abs().max())


def test_a_finite_float_mask_is_added_to_the_logits() -> None:
    block, x = _transformer(), draw(3, 5, 16, seed=1)
    added = draw(5, 5, seed=7, offset=0.0)
    expected = _by_formula(block, x, added).detach()
    assert_close(block(x, attn_mask=added).detach(), expected, 16 * expected.abs().max())


def test_padded_tokens_do_not_reach_the_others() -> None:
    block, x = _transformer(), draw(2, 5, 16, seed=1)
    padding = torch.tensor([[False] * 3 + [True] * 2] * 2)
    changed = x.clone()
    changed[:, 3:] = draw(2, 2, 16, seed=2)
    y, other = (block(value, key_padding_mask=padding)[:, :3].detach() for value in (x, changed))
    assert_close(other, y, 16 * y.abs().max())
    assert (block(changed)[:, :3] - block(x)[:, :3]).abs().max() > 0.1


def test_apply_leaves_the_packed_projection_at_torchs_own_initialisation() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16)
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(16, 8)
    shapes = {"ff.0": (64, 16), "ff.3": (16, 64)}
    for rows, columns in shapes.values():  # what the constructors of the linear layers draw
        nn.Linear(columns, rows)
    assert torch.equal(block.attn.in_proj_weight, attn.in_proj_weight)
    assert not torch.equal(block.attn.out_proj.weight, attn.out_proj.weight)
    shapes = {"attn.out_proj": (16, 16), **shapes}
    for name, shape in shapes.items():
        expected = nn.init.kaiming_normal_(torch.empty(shape), nonlinearity="relu")
        layer = block.get_submodule(name)
        assert torch.equal(layer.weight, expected)
        assert torch.equal(layer.bias, torch.zeros(shape[0]))


def test_the_transformer_block_defaults_are_the_documents() -> None:
    block = TransformerBlock(16)
    assert block.attn.num_heads == 8
    assert block.attn.dropout == block.ff[2].p == block.ff[4].p == 0.1
    assert block.ff[0].out_features == 64
    x = draw(2, 3, 16, seed=1, dtype="float32")
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
