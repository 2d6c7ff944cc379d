"""Stacks and chains of blocks: the numbers of a list of blocks from a program of one length."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flaxstab import blocks, dropout, linear, norms, optim, surgery
from flaxstab.models import Chain, Stack, stacked, unstacked
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_bytes
from parity_tests.support.layers import assert_same

C = 4
X = values(6, C, offset=1.0)


class Block(nnx.Module):
    """Everything that a block may hold: parameters, statistics, a stream of keys."""

    def __init__(self, rngs: nnx.Rngs, p: float = 0.5, width: int = C, **options: object) -> None:
        self.norm = norms.BatchNorm(C, **options)
        self.up = linear.Linear(C, width, rngs=rngs, **options)
        self.down = linear.Linear(width, C, rngs=rngs, **options)
        self.drop = dropout.Dropout(p, rngs=rngs)

    def __call__(self, x: jax.Array, shift: float | jax.Array = 0.0) -> jax.Array:
        return x + self.drop(self.down(jnp.tanh(self.up(self.norm(x) + shift))))


def several(number: int = 3, **options: object) -> list[nnx.Module]:
    rngs = nnx.Rngs(0)
    return [Block(rngs, **options) for _ in range(number)]


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test in NNX's graph mode and in tree mode."""
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        yield


def two_steps(model: nnx.Module) -> dict[str, object]:
    """Outputs, gradients and state of two steps in training, then evaluation."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    cotangent = jnp.asarray(values(*X.shape, seed=1))

    @jax.jit
    def step(rest: nnx.State) -> tuple[object, ...]:
        def run(params: nnx.State, *inputs: jax.Array) -> tuple[jax.Array, nnx.State]:
            merged = nnx.merge(graph, params, rest, copy=True)
            y = merged(*inputs)
            return y, nnx.state(merged, nnx.Not(nnx.Param))

        y, pull, moved = jax.vjp(run, params, jnp.asarray(X), jnp.full(C, 0.5)[None], has_aux=True)
        return y, *pull(cotangent), moved

    first, dparams, dx, dshift, rest = step(rest)
    second, *_, rest = step(rest)
    model = nnx.merge(graph, params, rest)
    model.eval()
    evaluated = jax.jit(lambda x: 1 * model(x))(jnp.asarray(X))
    found = {"first": first, "second": second, "dx": dx, "dshift": dshift, "evaluated": evaluated}
    return found | {"gradients": dparams, "moved": rest}


def stack_of(states: list[nnx.State]) -> list[jax.Array]:
    together = [jnp.stack(leaves) for leaves in zip(*map(jax.tree.leaves, states), strict=True)]
    return [_plain(leaf) for leaf in together]


def _plain(leaf: jax.Array) -> jax.Array:
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if key else leaf


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("options", [{}, {"remat": True, "unroll": 2}], ids=["plain", "all"])
def test_a_stack_computes_what_its_blocks_do(options: dict[str, object]) -> None:
    with jax.enable_x64(True):
        parts = several(param_dtype=jnp.float64)
        ours = two_steps(Stack(parts, **options))
        theirs = two_steps(Chain(parts, remat="remat" in options))
        for name in ("first", "second", "dx", "dshift", "evaluated"):
            assert_same(ours[name], theirs[name], size=1.0)
        for name in ("gradients", "moved"):
            expected = stack_of([theirs[name][number] for number in range(len(parts))])
            found = [_plain(leaf) for leaf in jax.tree.leaves(ours[name]["block"])]
            for mine, other in zip(found, expected, strict=True):
                assert_same(mine, other, size=1.0)
        assert (ours["first"] != ours["second"]).any()  # other elements are dropped


def test_each_block_of_a_stack_drops_other_elements() -> None:
    layers = [dropout.Dropout(0.5, rngs=rngs) for rngs in [nnx.Rngs(0)] for _ in range(5)]
    kept = np.asarray(Stack(layers)(jnp.ones((1000, C))))
    assert set(np.unique(kept)) == {0.0, 2.0**5}  # kept five times, at random
    assert (kept > 0).mean() < 0.1


def lines(number: int) -> int:
    graph, state = nnx.split(Stack(several(number)))

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state, copy=True)(x))

    params = nnx.filter_state(state, nnx.Param)
    rest = nnx.filter_state(state, nnx.Not(nnx.Param))
    gradient = jax.grad(lambda p, x: loss(nnx.merge_state(p, rest), x))
    return len(jax.jit(gradient).lower(params, jnp.asarray(X, jnp.float32)).as_text().splitlines())


def test_a_program_of_48_blocks_is_as_long_as_one_of_4() -> None:
    assert lines(48) <= 1.05 * lines(4)


def test_a_list_of_blocks_makes_a_longer_program() -> None:
    def length(number: int) -> int:
        chain = Chain(several(number))
        chain.eval()
        return len(jax.jit(lambda x: 1 * chain(x)).lower(X).as_text().splitlines())

    assert length(8) > 1.5 * length(4)


def test_a_rematerialised_stack_keeps_the_inputs_of_its_blocks() -> None:
    def kept(**options: object) -> float:
        graph, params, rest = nnx.split(Stack(several(8, width=64), **options), nnx.Param, ...)
        x = jnp.ones((64, C))
        held = jax.tree.leaves((params, rest))

        def run(x: jax.Array, params: nnx.State, rest: nnx.State) -> jax.Array:
            return nnx.merge(graph, params, rest)(x)

        return kept_bytes(run, x, params, rest, parameters=held) / x.nbytes

    assert 8 <= kept(remat=True) <= 8.5  # with the norms' statistics
    assert kept() > 2 * 8


def test_blocks_come_out_of_a_stack_as_they_went_in() -> None:
    parts = several()
    for found, expected in zip(Stack(parts).blocks(), parts, strict=True):
        assert nnx.graphdef(found) == nnx.graphdef(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(_plain(one), _plain(other))


def test_stacked_parameters_keep_their_roles() -> None:
    mask = optim.decay_mask(nnx.Dict(trunk=Stack(several())))
    assert mask.roles["trunk", "block", "norm", "scale"] == ((3, C), False, "normalisation")
    assert mask.roles["trunk", "block", "up", "bias"].decays is False
    assert mask.roles["trunk", "block", "up", "kernel"] == ((3, C, C), True, "weight")
    chain = Chain([blocks.BasicBlock(2, 2, rngs=nnx.Rngs(0)) for _ in range(2)], scan=True)
    assert surgery.zero_last_gamma(chain) == ["0.block.bn2.bias", "0.block.bn2.scale"]


def test_a_stack_in_evaluation_may_be_closed_over_and_its_outputs_captured() -> None:
    stack, x = Stack(several()), jnp.asarray(X, jnp.float32)
    _, seen = nnx.capture(stack, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
    assert seen["block"]["up"]["__call__"].get_value()[0].shape == (3, 6, C)
    stack.eval()
    assert jax.eval_shape(lambda x: 1 * stack(x), x).shape == x.shape


def test_a_call_may_be_given() -> None:
    chain = Chain([*several(2), *several(1, p=0.1)], scan=True)
    chain.eval()
    x = jnp.asarray(X, jnp.float32)
    expected = chain(x, 0.5)
    found = chain.run(lambda block, x: block(x, shift=0.5), x)
    np.testing.assert_array_equal(found, expected)
    assert (found != chain(x)).any()


def test_equal_neighbours_are_stacked_and_others_are_not() -> None:
    parts = [*several(2), *several(1, p=0.1), *several(1), *several(3, width=8)]
    chain = Chain(parts, scan=True, remat=True, unroll=2)
    assert [type(part) for part in chain] == [Stack, Block, Block, Stack]
    assert [part.length for part in chain if isinstance(part, Stack)] == [2, 3]
    assert all((p.remat, p.unroll) == (True, 2) for p in chain if isinstance(p, Stack))
    assert len(chain.blocks()) == len(parts)
    assert [type(part) for part in Chain(parts)] == [Block] * 7


class Nested(nnx.Module):
    """A chain of modules that hold chains."""

    def __init__(self) -> None:
        self.head = linear.Linear(C, C, rngs=nnx.Rngs(1))
        self.outer = Chain([Chain(several(2)), Chain(several(2))], remat=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.outer(x))


@pytest.mark.usefixtures("mode")
def test_a_models_chains_are_stacked_and_taken_apart() -> None:
    model = Nested()
    model.eval()
    x = jnp.asarray(X, jnp.float32)
    together = stacked(model, unroll=2)
    assert together.outer[0].block[0].block.up.kernel.shape == (2, 2, C, C)
    assert (together.outer.scan, together.outer.remat, together.outer.unroll) == (True, True, 2)
    apart = unstacked(together)
    assert nnx.graphdef(apart) == nnx.graphdef(model)
    np.testing.assert_array_equal(apart(x), model(x))
    bound = 64 * np.finfo(np.float32).eps * np.abs(X).max()
    assert np.abs(np.asarray(together(x) - model(x))).max() <= bound
    together.outer[0].block[0].block.up.kernel[...] *= 0
    assert model.outer[0][0].up.kernel[...].all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack([]), "a stack needs at least one block, got blocks=0"),
        (lambda: Stack(several(2), unroll=0), "unroll must be an integer of at least 1"),
        (lambda: Chain([], unroll=0), "unroll must be an integer of at least 1"),
        (
            lambda: Stack([*several(2), *several(1, p=0.1)]),
            "equal but for the values of their arrays, got block=2 and differs_in='drop.p'. Stack",
        ),
        (
            lambda: Stack([*several(1), *several(1, width=8)]),
            r"got block=1 and differs_in='(up|down)\.\w+_features'",
        ),
        (
            lambda: Stack([*several(1), *several(1, param_dtype=jnp.bfloat16)]),
            "got block=1 and differs_in='down.bias'",
        ),
        (
            lambda: Stack([*several(1), linear.Linear(C, C, rngs=nnx.Rngs(0))]),
            "got block=1 and differs_in='structure'",
        ),
        (lambda: stacked([1]), "model must be an nnx.Module, got type='list'"),
    ],
)
def test_what_cannot_be_stacked_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
