"""Vision Transformers and language models against ``torch_ref``."""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, functional, interop, models, norms, optim, recipes
from flaxstab.models import LMSize, TransformerLM, ViT, ViTSize
from parity_tests.support.cases import values
from parity_tests.support.one_step import assert_one_step
from torch_ref import transformers as theirs

SMALL = ViTSize(d=8, depth=2, nhead=2, patch_size=2, image_size=4)
WORDS, LM = 11, LMSize(d=8, depth=2, nhead=2, max_len=6)
IMAGES = values(3, 4, 4, 3, offset=1.0)
TOKENS = np.random.default_rng(0).integers(0, WORDS, (3, 5))


class FeaturesLast(torch.nn.Module):
    """Takes images with the channels last; tokens have their features last anyway."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.movedim(-1, 1))


def test_a_vision_transformer_is_its_twin() -> None:
    torch.manual_seed(0)
    twin = FeaturesLast(theirs.ViT(4, 2, 8, 1, 2, 5, p_drop=0.2))
    size = ViTSize(d=8, depth=1, nhead=2, patch_size=2, image_size=4)
    ours = ViT(size, 5, p_drop=0.2, attn_drop=0.2, rngs=nnx.Rngs(0))
    assert_one_step(ours, twin, IMAGES, rename=lambda name: name.removeprefix("model."))


def test_a_language_model_is_its_twin() -> None:
    torch.manual_seed(0)
    twin = theirs.TransformerLM(WORDS, 8, 1, 2, 6, p_drop=0.2)
    size = LMSize(d=8, depth=1, nhead=2, max_len=6)
    ours = TransformerLM(WORDS, size, p_drop=0.2, rngs=nnx.Rngs(0))
    assert_one_step(ours, twin, TOKENS)


Loss = Callable[[nnx.Module], jax.Array]


def lm_loss(model: nnx.Module) -> jax.Array:
    logits = model(jnp.asarray(TOKENS[:, :-1]))
    return functional.cross_entropy(logits, jnp.asarray(TOKENS[:, 1:]))


def vit_loss(model: nnx.Module) -> jax.Array:
    return functional.cross_entropy(model(jnp.asarray(IMAGES, jnp.float32)), jnp.arange(3))


def differentiated(
    make: Callable[..., nnx.Module], loss: Loss, variants: list[dict[str, bool]]
) -> list[tuple[nnx.Module, jax.Array]]:
    """Variants of a model that hold gradients for parameters, taken apart; and the losses."""
    found = []
    for options in variants:
        model = make(**options, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def step(params: object, rest: object, graph: object = graph) -> tuple[object, object]:
            merged = nnx.merge(graph, params, rest, copy=True)
            return loss(merged), nnx.state(merged, nnx.Not(nnx.Param))

        run = jax.jit(jax.value_and_grad(step, has_aux=True))
        (value, moved), gradient = run(params, rest)
        after = nnx.merge(graph, gradient, moved)
        found.append((models.unstacked(after), value))
    return found


SCANS = {
    "lm": (
        lambda **o: TransformerLM(WORDS, LM, p_drop=0.3, **o),
        lm_loss,
        [{}, {"scan": True}],
    ),
    "vit": (
        lambda **o: ViT(SMALL, 5, p_drop=0.3, attn_drop=0.3, **o),
        vit_loss,
        [{"remat": True}, {"scan": True, "remat": True}],
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_scanned_blocks_give_the_loss_and_gradients_of_unrolled_ones(name: str) -> None:
    """Dropout on: each block draws in the loop what it draws for itself."""
    (plain, expected), *others = differentiated(*SCANS[name])
    eps = np.finfo(np.float32).eps
    for model, loss in others:
        assert abs(loss - expected) <= 8 * eps * abs(expected)
        left, right = nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(plain))
        assert [path for path, _ in left] == [path for path, _ in right]
        for (path, ours), (_, theirs_) in zip(left, right, strict=True):
            a, b = ours.get_value(), theirs_.get_value()
            if not jnp.issubdtype(b.dtype, jnp.floating):
                assert bool((a == b).all()), path
                continue
            # The bound on float32: 1e-6 of the magnitude, which here is at least that of
            # the gradients of the loss for the logits, 1 / N.
            size = max(np.abs(b).max(), 1 / 3)
            assert np.abs(a - b).max() <= 1e-6 * size, path


def lines(depth: int, *, scan: bool) -> int:
    """Of the lowered program of one training step, dropout on."""

    def build() -> nnx.Module:
        model = TransformerLM(WORDS, LM, rngs=nnx.Rngs(0))
        copies = [nnx.clone(model.blocks[0]) for _ in range(depth)]
        model.blocks = models.Chain(copies, scan=scan)
        return model

    def step(model: nnx.Module) -> object:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return jax.grad(lambda p: lm_loss(nnx.merge(graph, p, rest, copy=True)))(params)

    return len(jax.jit(step).lower(nnx.eval_shape(build)).as_text().splitlines())


def test_a_scanned_program_does_not_grow_with_depth() -> None:
    assert lines(48, scan=True) <= 1.05 * lines(4, scan=True)


def test_an_unrolled_program_grows_with_depth() -> None:
    """By what two blocks add."""
    two, four, six = (lines(depth, scan=False) for depth in (2, 4, 6))
    assert six - four == four - two > 0.2 * two


def parameters(model: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("make", "count"), [
    (models.vit_tiny_patch16_224, 5_717_416),
    (models.vit_small_patch16_224, 22_050_664),
], ids=["tiny", "small"])  # fmt: skip
def test_vision_transformers_have_timms_parameter_counts(
    make: Callable[..., nnx.Module], count: int
) -> None:
    assert parameters(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))) == count


# What timm's VisionTransformer calls the tensors of one block.
TIMM_BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def test_timms_names_become_ours() -> None:
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names += [f"blocks.{i}.{name}" for i in range(2) for name in TIMM_BLOCK]
    names += ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    ours = interop.state_dict(ViT(SMALL, 5, rngs=nnx.Rngs(0)))
    assert sorted(map(models.from_timm, names)) == sorted(ours)
    scaled = nnx.List([blocks.TransformerBlock(
        8, 2, residual=blocks.Residual(layer_scale=0.1), rngs=nnx.Rngs(0)
    )])  # fmt: skip
    assert "0.add1.gamma" in interop.state_dict(scaled)
    assert models.from_timm("blocks.0.ls1.gamma") == "blocks.0.add1.gamma"


def test_timms_packed_weights_load() -> None:
    """Query, key and value lie in timm's qkv as in torch's in_proj_weight."""
    twin, ours = theirs.ViT(4, 2, 8, 2, 2, 5), ViT(SMALL, 5, rngs=nnx.Rngs(0))
    renamed = {
        "ln1": "norm1", "ln2": "norm2", "attn.in_proj_": "attn.qkv.", "attn.out_proj": "attn.proj",
        "ff.0": "mlp.fc1", "ff.3": "mlp.fc2",
    }  # fmt: skip
    state = dict(twin.state_dict())
    for mine, timms in renamed.items():
        state = {name.replace(mine, timms): tensor for name, tensor in state.items()}
    assert "blocks.1.attn.qkv.weight" in state
    interop.load_state_dict(ours, state, rename=models.from_timm)
    x = torch.tensor(IMAGES, dtype=torch.float32)
    expected = twin.eval()(x.movedim(-1, 1)).detach().numpy()
    ours.eval()
    found = np.asarray(ours(jnp.asarray(IMAGES, jnp.float32)))
    # 64 eps: what 2 blocks of sums of at most 32 terms may differ by, in units of the logits.
    assert np.abs(found - expected).max() <= 64 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_a_token_sees_what_comes_before_it_only() -> None:
    model = TransformerLM(WORDS, LM, rngs=nnx.Rngs(0))
    model.eval()
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % WORDS
    one, other = (np.asarray(model(jnp.asarray(tokens))) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    assert (one[:, 3:] != other[:, 3:]).any(-1).all()


def test_the_embedding_is_the_head_and_is_held_once() -> None:
    model = TransformerLM(WORDS, LM, rngs=nnx.Rngs(0))
    assert parameters(model) == 11 * 8 + 6 * 8 + 2 * (12 * 8 * 8 + 13 * 8) + 2 * 8
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        assert nnx.merge(*nnx.split(model))(jnp.asarray(TOKENS)).shape == (3, 5, WORDS)


def test_roles_exempt_tokens_and_positions_from_decay() -> None:
    vit = optim.decay_mask(ViT(SMALL, 5, rngs=nnx.Rngs(0))).roles
    lm = optim.decay_mask(TransformerLM(WORDS, LM, scan=True, rngs=nnx.Rngs(0))).roles
    assert not vit["cls_token",].decays
    assert not vit["pos_embed",].decays
    assert not lm["position",].decays
    stacked = {path: role for path, role in lm.items() if path[0] == "blocks"}
    assert {path[-1] for path, role in stacked.items() if role.decays} == {"kernel"}
    assert {path[-1] for path, role in stacked.items() if not role.decays} == {"bias", "scale"}


def test_paths_drop_more_often_with_depth() -> None:
    size, wiring = replace(SMALL, depth=3), blocks.Residual(drop_path=0.4)

    def found(**options: object) -> list[float]:
        model = ViT(size, 5, residual=wiring, **options, rngs=nnx.Rngs(0))
        return [b.add1.drop_path.p if b.add1.drop_path else 0.0 for b in model.blocks.blocks()]

    assert found() == [0.0, 0.2, 0.4]
    assert found(drop_path_rule="uniform", scan=True) == [0.4, 0.4, 0.4]


def test_a_layer_held_twice_stays_one_when_it_is_stacked() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.first = models.Chain([blocks.MLP(4, 4, rngs=rngs) for _ in range(2)])
            self.again = self.first

    for change in (models.stacked, models.unstacked):
        model = change(Twice())
        assert model.first is model.again
        assert parameters(model) == 2 * 2 * 20


def test_every_part_of_a_recipe_has_a_place() -> None:
    recipe = recipes.transformer
    model = TransformerLM(
        WORDS, LM, p_drop=recipe.dropout, attn_drop=recipe.attention_dropout, norm=recipe.norm,
        act=recipe.act, kernel_init=recipe.kernel_init, residual=recipe.residual, rngs=nnx.Rngs(0),
    )  # fmt: skip
    block = model.blocks[0]
    assert (block.attn.p, block.add1.scale) == (recipe.attention_dropout, recipe.residual.scale)
    assert block.ff.layers[1] is recipe.act
    vit = ViT(SMALL, 5, act=recipe.act, residual=recipe.residual, rngs=nnx.Rngs(0))
    assert vit.blocks[0].add2.scale == recipe.residual.scale


def test_the_laws_are_timms() -> None:
    """Standard deviations within 6 standard errors: but once in 5e8 samples."""
    size = ViTSize(d=32, depth=1, nhead=2, patch_size=4, image_size=16)
    model = ViT(size, 50, rngs=nnx.Rngs(0))
    block = model.blocks[0]
    drawn = [model.pos_embed, model.head.kernel, block.attn.query.kernel, block.attn.out.kernel,
             block.ff.layers[0].kernel, block.ff.layers[3].kernel]  # fmt: skip
    for variable in drawn:
        values_ = np.asarray(variable[...])
        assert abs(values_.std() - 0.02) <= 6 * 0.02 / math.sqrt(2 * values_.size)
    assert 0 < np.abs(np.asarray(model.cls_token[...])).max() < 6e-6
    assert not np.any(model.head.bias[...])
    assert model.norm.eps == block.ln1.eps == 1e-6


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ViTSize(patch_size=5, image_size=16), "patch_size must divide image_size, got patch"),
    (lambda: ViTSize(patch_size=0), "patch_size must be .* got patch_size=0"),
    (lambda: LMSize(depth=0), "depth must be .* got depth=0"),
    (lambda: ViT(10, rngs=nnx.Rngs(0)), r"size must be a ViTSize, got size=10\. Pass e\.g\."),
    (lambda: TransformerLM(10, 64, rngs=nnx.Rngs(0)), "size must be an LMSize, got size=64"),
    (
        lambda: ViT(SMALL, scan=True, residual=blocks.Residual(drop_path=0.1), rngs=nnx.Rngs(0)),
        "scan=True needs equal blocks: pass drop_path_rule='uniform', got drop_path_rule='linear'",
    ),
    (
        lambda: ViT(SMALL, act=nnx.PReLU(), scan=True, rngs=nnx.Rngs(0)),
        r"stacked blocks must hold variables of their own, got shared=\['ff\.layers\.1\.negative",
    ),
    (lambda: models.stacked(models.Stack([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])), "in a Chain, got"),
    (lambda: ViT(SMALL), "a layer with random weights needs rngs"),
    (
        lambda: ViT(SMALL, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4, 4))),
        r"images must be \(N, image_size, image_size, in_channels\), got image_size=4 and in_ch",
    ),
    (
        lambda: TransformerLM(WORDS, LM, rngs=nnx.Rngs(0))(jnp.zeros((1, 7), jnp.int32)),
        r"tokens must be \(N, L\), L at most max_len, got max_len=6 and shape=\(1, 7\)",
    ),
    (lambda: TransformerLM(0, LM, rngs=nnx.Rngs(0)), "vocab_size must be .* got vocab_size=0"),
])  # fmt: skip
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_another_norm_and_wiring_reach_every_block() -> None:
    wiring = blocks.Residual(scale=0.1)
    model = TransformerLM(WORDS, LM, norm=norms.RMSNorm, residual=wiring, rngs=nnx.Rngs(0))
    assert all(isinstance(b.ln1, norms.RMSNorm) and b.add2.scale == 0.1 for b in model.blocks)
    assert isinstance(model.norm, norms.RMSNorm)
