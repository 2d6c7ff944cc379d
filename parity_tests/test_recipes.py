"""``flaxstab.recipes`` against document 2's sections G and N, typed in here a second time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import blocks, functional, initializers, norms, optim, recipes
from parity_tests.support.cases import values

NAMES = ("cnn", "small_batch", "transformer")
each_recipe = pytest.mark.parametrize("name", NAMES)
CITED = {  # part by part: the sections that the presets follow
    "kernel_init": ("G-1", "G-3", "G-2"),
    "bias_init": ("N", "N", "N"),
    "norm": ("G-1", "G-3", "G-2"),
    "act": ("C-5", "I-1", "I-2"),
    "pre_norm": ("C-5", "I-1", "G-2"),
    "residual": ("G-1", "N", "G-2"),
    "dropout": ("N", "G-3", "G-2"),
    "attention_dropout": (None, None, "G-2"),
    "optimizer": ("N", "N", "G-2"),
    "weight_decay": ("G-1", "N", "G-2"),
    "no_decay": ("F-2", "F-2", "F-2"),
    "augmentation": ("G-1", "G-3", None),
}
RANGES = {  # the document's
    ("cnn", "dropout"): (0.0, 0.2),
    ("cnn", "weight_decay"): (0.01, 0.1),
    ("small_batch", "dropout"): (0.0, 0.2),
    ("small_batch", "weight_decay"): (0.01, 0.1),
    ("transformer", "dropout"): (0.1, 0.2),
    ("transformer", "attention_dropout"): (0.0, 0.1),
    ("transformer", "weight_decay"): (0.05, 0.1),
}


def recipe_of(name: str) -> recipes.Recipe:
    return getattr(recipes, name)


def test_each_part_cites_its_section() -> None:
    for column, name in enumerate(NAMES):
        cited = {source.part: source.section for source in recipe_of(name).sources}
        expected = {part: row[column] for part, row in CITED.items() if row[column]}
        assert cited == expected


@pytest.mark.parametrize(("name", "part"), RANGES)
def test_numbers_lie_in_the_documents_ranges(name: str, part: str) -> None:
    recipe, (low, high) = recipe_of(name), RANGES[name, part]
    source = recipe.source(part)
    assert (source.low, source.high) == (low, high)
    assert low <= getattr(recipe, part) <= high


def test_no_other_part_has_a_range() -> None:
    found = {(n, s.part) for n in NAMES for s in recipe_of(n).sources if s.low is not None}
    assert found == set(RANGES)


def test_norms_activations_and_tricks_are_the_documents() -> None:
    cnn, small, transformer = map(recipe_of, NAMES)
    assert (cnn.norm, transformer.norm) == (norms.BatchNorm, norms.LayerNorm)
    assert (small.norm.func, small.norm.args) == (norms.GroupNorm, (32,))
    assert [r.act for r in (cnn, small, transformer)] == [
        functional.relu, functional.relu, functional.gelu
    ]  # fmt: skip
    assert [r.pre_norm for r in (cnn, small, transformer)] == [False, True, True]
    assert cnn.residual == small.residual == blocks.Residual(zero_init=True)
    assert transformer.residual == blocks.Residual(scale=0.1)
    assert (cnn.attention_dropout, small.attention_dropout) == (None, None)
    assert {r.optimizer for r in (cnn, small, transformer)} == {"adamw"}
    assert {r.no_decay for r in (cnn, small, transformer)} == {("bias", "normalisation")}


@each_recipe
def test_kernels_start_by_hes_law_and_biases_at_0(name: str) -> None:
    recipe, key = recipe_of(name), jax.random.key(0)
    expected = initializers.kaiming_normal(mode="fan_in", nonlinearity="relu")
    for shape in ((3, 3, 4, 6), (4, 6)):
        np.testing.assert_array_equal(recipe.kernel_init(key, shape), expected(key, shape))
    assert recipe.kernel_init(key, (4, 6), jnp.bfloat16).dtype == jnp.bfloat16
    assert not recipe.bias_init(key, (6,), jnp.float32).any()


@each_recipe
def test_a_block_and_an_optimizer_are_built_from_it(name: str) -> None:
    recipe = recipe_of(name)
    make = partial(blocks.PreActResBlock, drop=0.1) if recipe.pre_norm else blocks.BasicBlock
    block = make(32, 32, norm=recipe.norm, act=recipe.act, kernel_init=recipe.kernel_init,
                 residual=recipe.residual, rngs=nnx.Rngs(0))  # fmt: skip
    mask = optim.decay_mask(block)
    exempt = {role.reason for role in mask.roles.values() if not role.decays}
    assert exempt <= set(recipe.no_decay)
    assert any(role.decays for role in mask.roles.values())
    make_tx = getattr(optim, recipe.optimizer)
    params = nnx.state(block, nnx.Param)
    tx = make_tx(1.0, weight_decay=recipe.weight_decay, mask=mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    decayed, kept = (updates[a][b][...] for a, b in (("conv1", "kernel"), next(
        (path[0], path[1]) for path, role in mask.roles.items() if not role.decays)))  # fmt: skip
    expected = -recipe.weight_decay * block.conv1.kernel[...]
    np.testing.assert_allclose(
        decayed, expected, rtol=8 * np.finfo(np.float32).eps
    )  # a few roundings
    assert not kept.any()
    x = jnp.asarray(values(2, 3, 3, 32, offset=0.5), jnp.float32)
    starts_at_skip = (block(x) == (x if recipe.pre_norm else nnx.relu(x))).all()
    assert starts_at_skip == recipe.residual.zero_init


@each_recipe
def test_a_recipe_is_frozen_hashable_and_prints_its_sources(name: str) -> None:
    recipe = recipe_of(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.dropout = 0.5  # type: ignore[misc]
    assert hash(recipe) == hash(dataclasses.replace(recipe))
    text = str(recipe)
    for source in recipe.sources:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{source.part} ")]
        assert f"  {source.section} " in line
        assert line.endswith(source.says)
    assert text.count("\n") == len(recipe.sources)
    with pytest.raises(TypeError, match="positional"):
        recipes.Recipe(recipe.kernel_init)  # type: ignore[call-arg, misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\], got dropout=1.5"),
        ({"attention_dropout": -0.1}, r"attention_dropout must lie in \[0, 1\]"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got weight_decay=-1.0"),
        (
            {"sources": recipes.cnn.sources[1:]},
            "must have a source, got without=.'bias_init'.. Add",
        ),
        ({"attention_dropout": 0.1}, "must have a source, got without=.'attention_dropout'"),
    ],
    ids=str,
)
def test_bad_parts_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipes.cnn, **change)
    with pytest.raises(ValueError, match=r"part must be one of bias_init, .*, got part='width'"):
        recipes.cnn.source("width")
