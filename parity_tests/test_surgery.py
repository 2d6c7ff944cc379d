"""``flaxstab.surgery``: rules reach every module once, and their draws hang on the path alone."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import linear, norms, surgery
from flaxstab.attention import MultiHeadAttention
from parity_tests.support.absent import needs_graph_mode
from torch_ref import blocks as torch_blocks
from torch_ref import initializers as torch_init

ONES = {  # without a draw, that is, without a compilation
    "kernel_init": nnx.initializers.ones,
    "bias_init": nnx.initializers.ones,
}


class Mixed(nnx.Module):
    """Every kind of container, with attributes in either order."""

    def __init__(self, *, swapped: bool = False, extra: bool = False) -> None:
        rngs = nnx.Rngs(0)
        parts = {
            "a_list": lambda: nnx.List([linear.Linear(2, 3, **ONES, rngs=rngs) for _ in range(11)]),
            "b_dict": lambda: nnx.Dict(
                y=nnx.Linear(2, 2, **ONES, rngs=rngs), x=nnx.Embed(3, 2, rngs=rngs)
            ),
            "c_plain": lambda: nnx.data(
                [linear.Linear(2, 2, **ONES, rngs=rngs), {"k": norms.LayerNorm(2)}]
            ),
            "d_net": lambda: nnx.Sequential(nnx.Conv(1, 2, (3, 3), **ONES, rngs=rngs), nnx.relu),
            "e_head": lambda: linear.Linear(2, 2, **ONES, rngs=rngs),
        }
        if extra:
            self.a_new = linear.Linear(2, 3, **ONES, rngs=rngs)
            self.z_new = nnx.List([linear.Linear(2, 3, **ONES, rngs=rngs)])
        for name in sorted(parts, reverse=swapped):
            setattr(self, name, parts[name]())


MIXED = [
    *[("a_list", n) for n in range(11)], ("a_list",), ("b_dict", "x"), ("b_dict", "y"),
    ("b_dict",), ("c_plain", 0), ("c_plain", 1, "k"), ("d_net", "layers", 0), ("d_net", "layers"),
    ("d_net",), ("e_head",), (),
]  # fmt: skip


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test in NNX's graph mode and in tree mode."""
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        yield


def draws(model: nnx.Module, seed: int = 7) -> dict[tuple[object, ...], np.ndarray]:
    """What a rule would draw at every path; nothing is changed."""
    paths: dict[int, tuple[object, ...]] = {}
    for path, module in nnx.iter_modules(model):
        paths.setdefault(id(module), path)
    found: dict[tuple[object, ...], np.ndarray] = {}

    def rule(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
        assert paths[id(module)] not in found
        found[paths[id(module)]] = np.asarray(jax.random.bits(rngs.params(), (4,)))

    surgery.init_weights(model, rule, rngs=nnx.Rngs(seed))
    return found


def assert_equal_draws(a: nnx.Module, b: nnx.Module) -> None:
    one, other = draws(a), draws(b)
    for path in one.keys() & other.keys():
        np.testing.assert_array_equal(one[path], other[path])


@pytest.mark.usefixtures("mode")
def test_every_module_is_visited_once_children_first() -> None:
    found = draws(Mixed())
    assert list(found) == MIXED
    assert len({bits.tobytes() for bits in found.values()}) == len(found)
    assert all(
        (a != b).any() for a, b in zip(found.values(), draws(Mixed(), 8).values(), strict=True)
    )


@pytest.mark.usefixtures("mode")
def test_neither_order_nor_siblings_nor_merging_change_a_draw() -> None:
    model = Mixed()
    for other in (
        Mixed(swapped=True),
        Mixed(extra=True),
        nnx.merge(*nnx.split(model)),
        nnx.clone(model),
    ):
        assert_equal_draws(model, other)
    assert len(draws(Mixed(extra=True))) == len(MIXED) + 3


def test_a_draw_that_hangs_on_the_order_is_found() -> None:
    """The fault: keys in the order of the visits."""
    one, other = nnx.Rngs(7), nnx.Rngs(7)
    keys = [{p: rngs.params() for p, _ in nnx.iter_modules(m)}
            for m, rngs in ((Mixed(), one), (Mixed(extra=True), other))]  # fmt: skip
    assert keys[0][("e_head",)] != keys[1][("e_head",)]


class Shared(nnx.Module):
    def __init__(self) -> None:
        self.b = linear.Linear(2, 2, rngs=nnx.Rngs(0))
        self.a = nnx.List([self.b])
        self.c = self.b


@needs_graph_mode
def test_a_shared_module_is_visited_once_under_its_first_path() -> None:
    """Torch visits it once for each parent, as the docstring says."""
    assert list(draws(Shared())) == [("a", 0), ("a",), ()]
    layer, visited = torch.nn.Linear(2, 2), []
    torch.nn.ModuleList([torch.nn.Sequential(layer), layer]).apply(visited.append)
    assert visited.count(layer) == 2


def test_a_module_without_variables_that_tree_mode_meets_twice_is_visited_once() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Dropout(0.0)
            self.b = self.a

    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        assert list(draws(Twice())) == [("a",), ()]


def test_names_with_dots_and_numbers_as_names_are_paths_of_their_own() -> None:
    def leaf() -> nnx.Module:
        return linear.Linear(2, 2, rngs=nnx.Rngs(0))

    model = nnx.Dict({"a.b": leaf(), "a": nnx.Dict(b=leaf())})
    found = draws(model)
    assert (found[("a.b",)] != found[("a", "b")]).any()


def test_the_rngs_are_used_once_and_a_stream_of_another_name_is_refused() -> None:
    rngs = nnx.Rngs(params=0, dropout=1)
    surgery.init_weights(Mixed(), surgery.init_layer, rngs=rngs)
    assert (int(rngs.params.count[...]), int(rngs.dropout.count[...])) == (1, 0)
    with pytest.raises(ValueError, match=r"with a 'params' stream or a default one, got \['drop"):
        surgery.init_weights(Mixed(), surgery.init_layer, rngs=nnx.Rngs(dropout=0))


def state_of(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.mark.usefixtures("mode")
def test_a_rule_that_raises_leaves_the_model_as_it_was() -> None:
    model = Mixed()
    model.e_head.kernel = nnx.Param(np.ones((2, 2), np.float32))  # NumPy's: changes in place
    kernel, before = model.a_list[0].kernel, [array.copy() for array in state_of(model)]
    second = np.asarray(model.a_list[1].kernel[...])

    def rule(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
        if module is model.a_list[0]:
            module.kernel = nnx.Param(jnp.zeros((2, 3)))
            module.bias = None
            module.new = nnx.Param(jnp.zeros(2))
        surgery.init_layer(module, rngs=rngs)
        if isinstance(module, Mixed):
            assert (model.a_list[1].kernel[...] != second).all()
            assert (model.e_head.kernel[...] != 1).all()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        surgery.init_weights(model, rule, rngs=nnx.Rngs(0))
    for a, b in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.a_list[0].kernel is kernel
    assert "new" not in vars(model.a_list[0])
    assert len(nnx.split(model)) == 2


def test_a_rule_that_raises_leaves_the_models_own_streams_as_they_were() -> None:
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model.own = nnx.Rngs(3)

    def rule(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
        raise RuntimeError(type(module), rngs)

    with pytest.raises(RuntimeError):
        surgery.init_weights(model, rule, rngs=model.own)
    assert int(model.own.default.count[...]) == 0


def test_weights_are_drawn_under_jit() -> None:
    def made() -> nnx.Module:
        rngs = nnx.Rngs(0)
        layers = [linear.Linear(2, 3, **ONES, rngs=rngs) for _ in range(2)]
        return nnx.List([*layers, nnx.Conv(1, 2, (3, 3), **ONES, rngs=rngs)])

    @nnx.jit
    def build(key: jax.Array) -> nnx.Module:
        model = made()
        surgery.init_weights(model, surgery.init_layer, rngs=nnx.Rngs(key))
        return model

    eager = made()
    surgery.init_weights(eager, surgery.init_layer, rngs=nnx.Rngs(jax.random.key(5)))
    for a, b in zip(state_of(build(jax.random.key(5))), state_of(eager), strict=True):
        # two roundings at most: XLA fuses the scaling of a draw
        np.testing.assert_array_max_ulp(a, b, 2)


@pytest.mark.usefixtures("mode")
def test_jit_changes_a_model_in_place() -> None:
    model, rule = linear.Linear(2, 3, rngs=nnx.Rngs(0)), surgery.init_layer
    before = state_of(model)
    nnx.jit(lambda m, rngs: surgery.init_weights(m, rule, rngs=rngs))(model, nnx.Rngs(1))
    assert all((a != b).all() for a, b in zip(state_of(model), before, strict=True))


class TorchPre(torch.nn.Module):
    """Attention, a recurrent cell and an RNN beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(4, 2)
        self.cell, self.fc = torch.nn.LSTMCell(4, 4), torch.nn.Linear(4, 4)


class Pre(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, stock: bool = False) -> None:
        own = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.attn = own if stock else MultiHeadAttention(4, 2, rngs=rngs)
        self.cell, self.fc = nnx.LSTMCell(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize("stock", [False, True], ids=["flaxstab", "nnx"])
def test_what_changes_in_attention_and_cells_is_what_changes_in_torch(stock: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = TorchPre(), Pre(nnx.Rngs(0), stock=stock)
    old = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    theirs.apply(torch_init.init_layer)
    kept = {n.split("_proj")[0] for n, p in theirs.named_parameters() if torch.equal(p, old[n])}
    assert kept == {"attn.in", "attn.out", "cell.weight_ih", "cell.weight_hh", "cell.bias_ih",
                    "cell.bias_hh"}  # fmt: skip
    # "attn.out" is its bias, which is 0 before and after
    assert not torch.equal(theirs.attn.out_proj.weight, old["attn.out_proj.weight"])

    before = dict(nnx.to_flat_state(jax.tree.map(jnp.copy, nnx.state(ours))))
    surgery.init_weights(ours, surgery.init_layer, rngs=nnx.Rngs(1))
    changed = {
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(nnx.state(ours))
        if (variable[...] != before[path][...]).any()
    }
    assert changed == {"attn.out.kernel", "fc.kernel"}
    query, old_query = ours.attn.query, ours.attn.query.kernel[...]
    surgery.init_layer(query, rngs=nnx.Rngs(1))
    assert (query.kernel[...] != old_query).all()  # by itself it is a layer like any other


def test_a_transformer_block_keeps_torchs_attention_as_the_documents_do() -> None:
    torch.manual_seed(0)
    block = torch_blocks.TransformerBlock(4, 2)
    bound = math.sqrt(6 / (4 + 12))
    assert block.attn.in_proj_weight.abs().max() <= bound  # Xavier's: not reached by apply


def test_a_stack_is_initialised_as_part_of_a_model() -> None:
    """The draws of a stack do not depend on how many modules surround it."""

    class Model(nnx.Module):
        def __init__(self, *, head: bool) -> None:
            self.layers = nnx.vmap(lambda rngs: linear.Linear(4, 4, **ONES, rngs=rngs))(
                nnx.Rngs(0).split(3)
            )
            if head:
                self.head = linear.Linear(4, 2, **ONES, rngs=nnx.Rngs(0))

    models = [Model(head=False), Model(head=True)]
    for model in models:
        surgery.init_weights(model, surgery.init_layer, rngs=nnx.Rngs(1))
    kernels, others = (np.asarray(model.layers.kernel[...]) for model in models)
    np.testing.assert_array_equal(kernels, others)
    assert len({kernel.tobytes() for kernel in kernels}) == 3
