"""``flaxstab.optim.decay_mask`` decides by role, in every form of the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flaxstab import linear, models, norms, optim
from parity_tests.support.absent import needs_graph_mode

NORMS = {
    "batch": lambda: norms.BatchNorm(4),
    "ghost": lambda: norms.GhostBatchNorm(4, 2),
    "group": lambda: norms.GroupNorm(2, 4),
    "instance": lambda: norms.InstanceNorm(4, affine=True),
    "layer": lambda: norms.LayerNorm((3, 4)),  # two-dimensional parameters
    "rms": lambda: norms.RMSNorm(4),
    "nnx batch": lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
    "nnx group": lambda: nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)),
    "nnx instance": lambda: nnx.InstanceNorm(4, rngs=nnx.Rngs(0)),
    "nnx layer": lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
    "nnx rms": lambda: nnx.RMSNorm(4, rngs=nnx.Rngs(0)),
}
WEIGHTED = {
    "linear": lambda: linear.Linear(3, 4, rngs=nnx.Rngs(0)),
    "conv": lambda: linear.Conv(3, 4, 3, rngs=nnx.Rngs(0)),
    "nnx linear": lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
    "nnx conv": lambda: nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0)),
    "nnx einsum": lambda: nnx.Einsum("ab,bc->ac", (3, 4), (4,), rngs=nnx.Rngs(0)),
    "nnx attention": lambda: nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)),
    "nnx lstm": lambda: nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)),
    "nnx gru": lambda: nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)),
    "conv transpose": lambda: linear.ConvTranspose(3, 4, 3, rngs=nnx.Rngs(0)),
    "nnx conv transpose": lambda: nnx.ConvTranspose(3, 4, (3,), rngs=nnx.Rngs(0)),
    "nnx low-rank linear": lambda: nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0)),
}


def decaying(model: nnx.Module, **options: object) -> set[str]:
    """The names of the parameters that decay, without asking the mask for its own table."""
    mask = optim.decay_mask(model, **options)(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    flat, _ = jax.tree_util.tree_flatten_with_path(mask)
    return {".".join(str(entry.key) for entry in path) for path, decays in flat if decays}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_no_parameter_of_a_norm_decays(make: object) -> None:
    model = make()
    assert jax.tree.leaves(nnx.state(model, nnx.Param))
    assert decaying(model) == set()


@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED)
def test_weights_decay_and_biases_do_not(make: object) -> None:
    model = make()
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    biases = {name for name in names if name.split(".")[-1] == "bias"}
    assert biases
    assert decaying(model) == names - biases


def test_the_two_dimensional_biases_of_nnx_attention_do_not_decay() -> None:
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    assert attention.query.bias.ndim == 2
    assert decaying(attention) == {f"{part}.kernel" for part in ("query", "key", "value", "out")}


def test_stacked_norms_and_biases_keep_their_roles() -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = linear.Linear(4, 4, rngs=rngs)
            self.norm = norms.LayerNorm(4)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(self.linear(x))

    stacked = nnx.vmap(Layer)(nnx.Rngs(0).split(3))
    assert stacked.norm.scale.shape == (3, 4)
    assert stacked.linear.bias.shape == (3, 4)
    assert decaying(stacked) == {"linear.kernel"}

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: Layer) -> jax.Array:
        return layer(x)

    graph, params = nnx.split(stacked)
    gradients = nnx.grad(lambda p: run(jnp.ones((2, 4)), nnx.merge(graph, p)).sum())(params)
    mask = optim.decay_mask(stacked)
    assert decaying(stacked) == {"linear.kernel"}
    chosen = nnx.to_pure_dict(mask(gradients))
    assert chosen["linear"] == {"kernel": True, "bias": False}
    assert chosen["norm"] == {"scale": False, "bias": False}


class MyNorm(nnx.Module):
    """A user's own, in PyTorch's names."""

    def __init__(self) -> None:
        self.weight, self.shift = nnx.Param(jnp.ones(4)), nnx.Param(jnp.ones((1, 4)))


class _User(nnx.Module):
    """Pieces that users write themselves, with names that are easily taken for others."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = MyNorm()
        self.scale = nnx.Param(jnp.ones(4))
        self.scaled = nnx.Param(jnp.ones((4, 4)))
        self.unbiased = nnx.Param(jnp.ones((4, 4)))
        self.relative_position_bias_table = nnx.Param(jnp.ones((9, 2)))
        self.biases = nnx.List([nnx.Param(jnp.ones((2, 4)))])
        self.value = nnx.Param(jnp.ones((4, 4)))
        self.low_rank = nnx.LoRA(4, 2, 4, rngs=rngs)
        self.slope = nnx.PReLU()
        self.pair = nnx.Param({"value": jnp.ones((4, 4)), "other": jnp.ones((4, 4))})


DECAYING = {
    *("scaled", "unbiased", "value", "low_rank.lora_a", "low_rank.lora_b"),
    *("pair.value", "pair.other"),
}


def test_what_users_write_is_known_by_its_role() -> None:
    model = _User(nnx.Rngs(0))
    assert decaying(model) == DECAYING
    roles = {".".join(path): role for path, role in optim.decay_mask(model).roles.items()}
    assert roles["norm.weight"].reason == roles["norm.shift"].reason == "normalisation"
    assert (roles["scale"].reason, roles["slope.negative_slope"].reason) == ("scale", "slope")
    assert roles["biases.0"].reason == roles["relative_position_bias_table"].reason == "bias"
    assert roles["pair.other"].shape == (4, 4)


@pytest.mark.parametrize("form", ["state", "pure dict", "nnx.as_pure", "split"])
def test_parameters_called_value_and_dicts_of_them_are_found_in_every_form(form: str) -> None:
    model = _User(nnx.Rngs(0))
    params = jax.tree.map(jnp.ones_like, _forms(model)[form])
    mask = optim.decay_mask(model)
    chosen = jax.tree.leaves(mask(params))
    pure = jax.tree.leaves(mask(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    assert chosen == pure
    assert sum(chosen) == len(DECAYING)
    tx = optim.sgd(0.5, weight_decay=0.5, mask=mask(params))  # a tree, given in either form
    for tree in (params, nnx.as_pure(params)):
        still = jax.tree.map(jnp.zeros_like, tree)
        updates, _ = jax.jit(tx.update)(still, tx.init(tree), tree)
        assert [bool(u.any()) for u in jax.tree.leaves(updates)] == chosen


@pytest.mark.parametrize("make", [linear.Embed, nnx.Embed], ids=["ours", "nnx"])
def test_embeddings_decay_unless_told_otherwise(make: object) -> None:
    class Tokens(nnx.Module):
        def __init__(self) -> None:
            self.tokens = make(7, 4, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(4, 7, rngs=nnx.Rngs(0))

    model = Tokens()
    assert decaying(model) == {"tokens.embedding", "head.kernel"}
    assert decaying(model, embeddings=False) == {"head.kernel"}
    assert optim.decay_mask(model).roles[("tokens", "embedding")].reason == "embedding"


def test_filters_exempt_further_parameters() -> None:
    class Vit(nnx.Module):
        def __init__(self) -> None:
            self.pos_embed = nnx.Param(jnp.ones((1, 5, 4)))
            self.cls_token = nnx.Param(jnp.ones((1, 1, 4)), role="class token")
            self.head = nnx.Linear(4, 7, rngs=nnx.Rngs(0))

    model = Vit()
    assert decaying(model) == {"pos_embed", "head.kernel"}
    exempt = (nnx.PathContains("pos_embed"),)
    assert decaying(model, exempt=exempt) == {"head.kernel"}
    assert optim.decay_mask(model, exempt=exempt).roles[("pos_embed",)].reason == "exempt"
    with pytest.raises(ValueError, match=r"a filter must take a parameter .*PathContains"):
        optim.decay_mask(model, exempt=(nnx.PathContains("nowhere"),))
    with pytest.raises(ValueError, match=r"model must be an nnx.Module, got model_type='State'"):
        optim.decay_mask(nnx.state(model))


def test_a_scanned_transformer_keeps_its_roles() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.ln = norms.LayerNorm(4)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.ffn = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.PReLU())

    model = nnx.vmap(Block)(nnx.Rngs(0).split(3))
    assert model.attention.query.bias.ndim == 3
    parts = ("query", "key", "value", "out")
    assert decaying(model) == {"ffn.layers.0.kernel", *(f"attention.{p}.kernel" for p in parts)}


class _Roles(nnx.Module):
    def __init__(self) -> None:
        self.token = nnx.Param(jnp.ones((1, 1, 4)), role="class token")
        self.gamma = nnx.Param(jnp.ones((4,)), role="layer scale")
        self.plain = nnx.Param(jnp.ones((4,)))
        self.kv_bias = nnx.Param(jnp.ones((1, 1, 4)))
        self.bias_k = nnx.Param(jnp.ones((1, 1, 4)))
        self.explicit = nnx.Param(jnp.ones((4,)), role="weight")


def test_role_metadata_exempts_and_is_shown() -> None:
    model = _Roles()
    assert decaying(model) == {"plain", "explicit"}
    roles = optim.decay_mask(model).roles
    assert roles[("token",)].reason == "class token"
    assert roles[("gamma",)].reason == "layer scale"
    assert roles[("kv_bias",)].reason == roles[("bias_k",)].reason == "bias"


class _Nested(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.branches = nnx.Dict(
            left=nnx.List([linear.Linear(2, 2, rngs=rngs), norms.LayerNorm(2)]),
            right=nnx.Dict(deep=nnx.List([nnx.List([linear.Linear(2, 2, rngs=rngs)])])),
        )
        self.scales = nnx.List([nnx.Param(jnp.ones((2,))), nnx.Param(jnp.ones((2,)), role="gain")])


def _forms(model: nnx.Module) -> dict[str, object]:
    state = nnx.state(model, nnx.Param)
    return {
        "state": state,
        "pure dict": nnx.to_pure_dict(state),
        "nnx.as_pure": nnx.as_pure(state),
        "split": nnx.split(model, nnx.Param, ...)[1],
    }


NESTED = {
    "branches.left.0.kernel": True,
    "branches.left.0.bias": False,
    "branches.left.1.scale": False,
    "branches.left.1.bias": False,
    "branches.right.deep.0.0.kernel": True,
    "branches.right.deep.0.0.bias": False,
    "scales.0": True,
    "scales.1": False,
}


@pytest.mark.parametrize("form", ["state", "pure dict", "nnx.as_pure", "split"])
def test_lists_and_dicts_are_walked_in_every_form_of_the_tree(form: str) -> None:
    model = _Nested(nnx.Rngs(0))
    mask = optim.decay_mask(model)
    params = _forms(model)[form]
    chosen = mask(params)
    assert jax.tree.structure(chosen) == jax.tree.structure(params)
    assert all(isinstance(leaf, bool) for leaf in jax.tree.leaves(chosen))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = [".".join(map(str, path)) for path, _ in flat]
    assert dict(zip(names, jax.tree.leaves(chosen), strict=True)) == NESTED


def test_a_part_of_the_parameters_gets_its_part_of_the_mask() -> None:
    model = _Nested(nnx.Rngs(0))
    part = {"branches": {"left": {"0": {"kernel": jnp.ones(()), "bias": jnp.ones(())}}}}
    chosen = optim.decay_mask(model)(part)
    assert chosen == {"branches": {"left": {"0": {"kernel": True, "bias": False}}}}


def test_in_tree_mode_gradients_are_modules_and_parts_may_be_called_value() -> None:
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
        mask = optim.decay_mask(model)
        gradients = jax.tree.map(
            jnp.zeros_like, nnx.grad(lambda m: m(jnp.ones((1, 2, 4))).sum())(model)
        )
        assert isinstance(gradients, nnx.Module)
        chosen = mask(gradients)
        assert jax.tree.leaves(chosen) == [False, True] * 4
        before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        for given in (mask, chosen):
            tx = optim.sgd(0.5, weight_decay=1.0, mask=given)
            nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, gradients)
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for part in ("query", "key", "value", "out"):
        assert after[part]["kernel"].tolist() == (0.25 * before[part]["kernel"]).tolist()


def test_an_unknown_leaf_is_named_with_the_known_ones() -> None:
    mask = optim.decay_mask(linear.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"got leaf='head.kernel'. Known parameters: .*kernel"):
        mask({"head": {"kernel": jnp.ones(())}})


@needs_graph_mode
def test_a_shared_layer_is_listed_once() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.norm = norms.LayerNorm(3)
            self.again = self.norm
            self.final = linear.Linear(3, 3, rngs=nnx.Rngs(0))

    assert decaying(Tied()) == {"final.kernel"}


def test_the_table_shows_every_parameter_with_shape_and_role() -> None:
    model = models.StableCNN(widths=(16,), image_size=2, rngs=nnx.Rngs(0))
    lines = str(optim.decay_mask(model)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "decays", "role"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert rows.keys() == {
        *("blocks.0.conv.kernel", "blocks.0.norm.scale", "blocks.0.norm.bias"),
        *("head.kernel", "head.bias"),
    }
    assert rows["blocks.0.conv.kernel"].split()[-2:] == ["yes", "weight"]
    assert "(3, 3, 3, 16)" in rows["blocks.0.conv.kernel"]
    assert rows["blocks.0.norm.scale"].split()[-2:] == ["no", "normalisation"]
    assert rows["head.bias"].split()[-2:] == ["no", "bias"]
    assert len({line.index("weight") for line in lines if "weight" in line}) == 1


@pytest.mark.parametrize("make", [optim.adamw, optax.adamw, optax.lion], ids=lambda f: f.__module__)
@pytest.mark.parametrize("jit", [True, False])
def test_the_mask_serves_optimizers_inside_nnx_optimizer(make: object, jit: bool) -> None:
    model = _Nested(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = make(0.5, weight_decay=0.5, mask=optim.decay_mask(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))

    (nnx.jit(step) if jit else step)(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    ratios = jax.tree.map(lambda a, b: b == 0.75 * a if a.any() else None, before, after)
    flat, _ = jax.tree_util.tree_flatten_with_path(ratios)
    found = {".".join(str(entry.key) for entry in path): bool(leaf.all()) for path, leaf in flat}
    assert found == {name: NESTED[name] for name in found}
    assert {"branches.left.0.kernel", "scales.0", "scales.1"} <= found.keys()


def test_rank_decides_wrongly_where_the_mask_decides_right() -> None:
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    params = nnx.state(attention, nnx.Param)
    by_rank = jax.tree.map(lambda leaf: np.ndim(leaf) > 1, params)
    assert jax.tree.leaves(by_rank) != jax.tree.leaves(optim.decay_mask(attention)(params))


class LayerNorm2d(nnx.Module):
    """A norm by name only, whose parameters are called otherwise, one in a list."""

    def __init__(self) -> None:
        self.weight, self.beta = nnx.Param(jnp.ones(4)), nnx.Param(jnp.ones(4))
        self.gammas = nnx.List([nnx.Param(jnp.ones(4))])


class NormalizedLinear(nnx.Module):
    """No norm, though its name begins like one's."""

    def __init__(self) -> None:
        self.matrix, self.gain = nnx.Param(jnp.ones((4, 4))), nnx.Param(jnp.ones(4))


def test_a_norm_is_known_by_a_word_of_its_name_and_through_lists() -> None:
    assert decaying(LayerNorm2d()) == set()
    model = NormalizedLinear()
    assert decaying(model) == {"matrix", "gain"}
    rows = {line.split()[0]: line for line in str(optim.decay_mask(model)).splitlines()}
    assert "of one axis: give it a role" in rows["gain"]
    assert rows["matrix"].endswith("weight")


@needs_graph_mode
@pytest.mark.parametrize("names", ["az", "za"])
def test_a_tied_table_is_an_embedding_whatever_its_places_are_called(names: str) -> None:
    table, head = linear.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.Module()
    head.kernel = table.embedding
    model = nnx.Module()
    setattr(model, names[0], table)
    setattr(model, names[1], head)
    assert {role.reason for role in optim.decay_mask(model).roles.values()} == {"embedding"}
    assert decaying(model, embeddings=False) == set()
