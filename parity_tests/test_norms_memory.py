"""What a norm keeps for its backward pass, and that nothing of its derivative is lost by it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as torch_functional

from flaxstab import functional, norms
from flaxstab._typing import Array
from flaxstab.functional import RunningStats
from parity_tests.support.cases import values
from parity_tests.support.kept import kept_bytes
from parity_tests.support.layers import assert_same, channels_first, channels_last

C = 64
SHAPE = (8, 16, 16, C)
KEPT = 1.02  # of the input's bytes; DESIGN, "Performance"
RUNNING = RunningStats(jnp.zeros(C), jnp.ones(C), jnp.zeros((), jnp.int32))
Norm = Callable[[Array, Array, Array], Array]
NORMS: dict[str, Norm] = {
    "batch": lambda x, g, b: functional.batch_norm(x, g, b)[0],
    "batch, tracked": lambda x, g, b: functional.batch_norm(x, g, b, RUNNING)[0],
    "batch, evaluation": lambda x, g, b: functional.batch_norm_inference(x, RUNNING, g, b),
    "layer": lambda x, g, b: functional.layer_norm(x, (C,), g, b),
    "rms": lambda x, g, b: functional.rms_norm(x, (C,), g) + b[None, None, None],
    "group": lambda x, g, b: functional.group_norm(x, 32, g, b),
    "instance": lambda x, g, b: functional.instance_norm(x, g, b)[0],
    "instance, tracked": lambda x, g, b: functional.instance_norm(x, g, b, RUNNING)[0],
}


def stock_layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    layer = nnx.LayerNorm(C, use_fast_variance=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    leaves = [bias, scale]  # by name
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))(x)


def kept(norm: Norm, dtype: str) -> float:
    """Bytes kept beside the parameters, in units of the input's."""
    x = jnp.asarray(values(*SHAPE), dtype)
    affine = jnp.ones(C), jnp.zeros(C)
    return kept_bytes(norm, x, *affine, parameters=affine) / x.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_keeps_its_input_alone(name: str, dtype: str) -> None:
    assert 1 <= kept(NORMS[name], dtype) <= KEPT


LAYERS: dict[str, Callable[[], nnx.Module]] = {
    "BatchNorm": lambda: norms.BatchNorm(C),
    "GhostBatchNorm": lambda: norms.GhostBatchNorm(C, 3),
    "FrozenBatchNorm": lambda: norms.FrozenBatchNorm(C),
    "LayerNorm": lambda: norms.LayerNorm((16, C)),
    "RMSNorm": lambda: norms.RMSNorm(C),
    "GroupNorm": lambda: norms.GroupNorm(4, C),
    "InstanceNorm": lambda: norms.InstanceNorm(C, affine=True, track_running_stats=True),
}


def test_every_norm_has_a_row() -> None:
    assert set(LAYERS) == {name for name in vars(norms) if name.endswith("Norm")}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_its_input_at_most(name: str) -> None:
    """In bfloat16, the hardest case, with the statistics that it updates. Frozen, it keeps less."""
    graph, params, rest = nnx.split(LAYERS[name](), nnx.Param, ...)

    def run(x: Array, params: nnx.State, rest: nnx.State) -> object:
        layer = nnx.merge(graph, params, rest)
        y = layer(x)
        return y, jax.lax.stop_gradient(nnx.state(layer, nnx.BatchStat))

    x = jnp.asarray(values(*SHAPE), jnp.bfloat16)
    found = kept_bytes(run, x, params, rest, parameters=jax.tree.leaves((params, rest)))
    assert 0 < found <= KEPT * x.nbytes


@pytest.mark.parametrize(("dtype", "floor"), [("float32", 2.9), ("bfloat16", 5.8)])
def test_the_stock_layer_norm_keeps_more(dtype: str, floor: float) -> None:
    """What the limit is for, and that it is not met by anything."""
    assert kept(stock_layer_norm, dtype) > floor


def test_a_mask_is_kept_as_it_was_given() -> None:
    x, mask = jnp.asarray(values(*SHAPE), jnp.bfloat16), jnp.ones((*SHAPE[:3], 1), bool)
    found = kept_bytes(lambda x, m: functional.batch_norm(x, mask=m)[0], x, mask)
    assert found <= KEPT * x.nbytes + mask.nbytes


@pytest.mark.parametrize("act", [jax.nn.relu, functional.gelu])
@pytest.mark.parametrize("name", NORMS)
def test_norm_act_keeps_no_more(name: str, act: Callable[[Array], Array]) -> None:
    norm = NORMS[name]
    fused = kept(lambda x, *p: functional.norm_act(lambda x: norm(x, *p), act, x), "bfloat16")
    apart = kept(lambda x, *p: act(norm(x, *p)), "bfloat16")
    assert fused <= KEPT < 1.4 < apart


@pytest.mark.parametrize("name", NORMS)
def test_norm_add_act_keeps_its_two_inputs(name: str) -> None:
    x, affine = jnp.asarray(values(*SHAPE), jnp.bfloat16), (jnp.ones(C), jnp.zeros(C))

    def fused(x: Array, residual: Array, *p: Array) -> Array:
        return functional.norm_add_act(lambda x: NORMS[name](x, *p), jax.nn.relu, x, residual)

    found = kept_bytes(fused, x, x + 1, *affine, parameters=affine)
    assert found <= 2 * KEPT * x.nbytes


@pytest.mark.parametrize("name", NORMS)
def test_fused_forms_compute_the_same(name: str) -> None:
    x, residual, cotangent = (values(2, 3, 3, C, seed=s) for s in range(3))
    affine = values(C, seed=3), values(C, seed=4)

    def run(fused: bool, *arrays: Array) -> object:
        def one(x: Array, *p: Array) -> Array:
            norm = lambda x: NORMS[name](x, *p)  # noqa: E731
            return functional.norm_act(norm, jnp.tanh, x) if fused else jnp.tanh(norm(x))

        def two(x: Array, r: Array, *p: Array) -> Array:
            norm = lambda x: NORMS[name](x, *p)  # noqa: E731
            if fused:
                return functional.norm_add_act(norm, jnp.tanh, x, r)
            return jnp.tanh(norm(x) + r)

        x, residual, *p = arrays
        first, first_back = jax.vjp(one, x, *p)
        second, second_back = jax.vjp(two, x, residual, *p)
        return first, first_back(cotangent), second, second_back(cotangent)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in (x, residual, *affine)]
        found, plain = (jax.tree.leaves(run(fused, *arrays)) for fused in (True, False))
        for ours, theirs in zip(found, plain, strict=True):
            assert_same(ours, theirs, size=np.abs(values(C, seed=3)).max())


def test_fused_forms_pass_statistics_on() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(values(4, 3, C))
        norm = lambda x: functional.batch_norm(x, running=RUNNING)  # noqa: E731
        plain, running = norm(x)
        y, fused = functional.norm_act(norm, jax.nn.relu, x)
        z, added = functional.norm_add_act(norm, jax.nn.relu, x, x)
        assert_same(y, jax.nn.relu(plain))
        assert_same(z, jax.nn.relu(plain + x))
    for other in (fused, added):
        assert running is not None
        assert other is not None
        np.testing.assert_array_equal(other.var, running.var)
        assert int(other.batches) == 1


def in_float64(tree: object) -> object:
    widened = lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return jax.tree.map(widened, tree)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_fused_forms_of_a_layer_compute_the_same_and_move_its_statistics(
    name: str, training: bool
) -> None:
    layer = LAYERS[name]()
    layer.set_attributes(use_running_average=not training, raise_if_not_found=False)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def run(fused: bool, x: Array, residual: Array) -> object:
        def loss(params: object, rest: object, x: Array, residual: Array) -> tuple[Array, object]:
            layer = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest))
            if fused:
                y = norms.norm_act(layer, jnp.tanh, x)
                y = norms.norm_add_act(layer, jnp.tanh, y, residual)
            else:
                y = jnp.tanh(layer(jnp.tanh(layer(x))) + residual)
            return jnp.sum(y**3), nnx.state(layer, nnx.BatchStat)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 2, 3), has_aux=True))
        return jax.tree.leaves(gradient(*map(in_float64, (params, rest)), x, residual))

    with jax.enable_x64(True):
        x, residual = (jnp.asarray(values(*SHAPE[1:], seed=s))[None] for s in (1, 2))
        for ours, theirs in zip(run(True, x, residual), run(False, x, residual), strict=True):
            assert_same(ours, theirs, size=float(x.size))


def test_the_fused_form_of_a_layer_keeps_its_input_alone() -> None:
    graph, params, rest = nnx.split(norms.BatchNorm(C), nnx.Param, ...)

    def run(x: Array, params: nnx.State, rest: nnx.State) -> Array:
        return norms.norm_act(nnx.merge(graph, params, rest), functional.gelu, x)

    x = jnp.asarray(values(*SHAPE), jnp.bfloat16)
    found = kept_bytes(run, x, params, rest, parameters=jax.tree.leaves((params, rest)))
    assert found <= KEPT * x.nbytes


def test_a_fused_form_changes_the_layer_that_it_is_given() -> None:
    layer, x = norms.BatchNorm(3), jnp.asarray(values(4, 3), jnp.float32)
    norms.norm_act(layer, jax.nn.relu, x)
    plain = norms.BatchNorm(3)
    plain(x)
    np.testing.assert_array_equal(layer.var[...], plain.var[...])
    assert int(layer.count[...]) == 1


def test_in_evaluation_a_fused_form_may_be_closed_over_by_a_program() -> None:
    layer, x = norms.BatchNorm(3), jnp.asarray(values(4, 3), jnp.float32)
    layer.eval()
    assert jax.eval_shape(lambda x: norms.norm_act(layer, jax.nn.relu, x), x).shape == x.shape
    layer.train()
    with pytest.raises(Exception, match="different trace level"):
        jax.eval_shape(lambda x: norms.norm_act(layer, jax.nn.relu, x), x)


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        norms.norm_add_act(norms.BatchNorm(3), jax.nn.relu, jnp.ones((4, 3)), jnp.ones((1, 3)))


TorchNorm = Callable[..., torch.Tensor]


def first(function: TorchNorm) -> TorchNorm:
    return lambda x, g, b: channels_last(function(channels_first(x), g, b))


TWINS: dict[str, tuple[Norm, TorchNorm]] = {
    "batch": (
        lambda x, g, b: functional.batch_norm(x, g, b)[0],
        first(lambda x, g, b: torch_functional.batch_norm(x, None, None, g, b, training=True)),
    ),
    "layer": (
        lambda x, g, b: functional.layer_norm(x, (6,), g, b),
        lambda x, g, b: torch_functional.layer_norm(x, (6,), g, b),
    ),
    "rms": (
        lambda x, g, b: functional.rms_norm(x, (6,), g) + b[None, None, None],
        lambda x, g, b: torch_functional.rms_norm(x, (6,), g) + b,
    ),
    "group": (
        lambda x, g, b: functional.group_norm(x, 3, g, b),
        first(lambda x, g, b: torch_functional.group_norm(x, 3, g, b)),
    ),
    "instance": (
        lambda x, g, b: functional.instance_norm(x, g, b)[0],
        first(lambda x, g, b: torch_functional.instance_norm(x, weight=g, bias=b)),
    ),
}


def arguments() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Returns inputs, a direction in their space, and a cotangent."""
    shapes = (2, 3, 2, 6), (6,), (6,)
    points = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    directions = [values(*shape, seed=10 + i, offset=0.5) for i, shape in enumerate(shapes)]
    return points, directions, values(*shapes[0], seed=20, offset=0.5)


@pytest.mark.parametrize("how", ["eager", "jit", "remat"])
@pytest.mark.parametrize("name", TWINS)
def test_forward_mode_is_torchs(name: str, how: str) -> None:
    ours, theirs = TWINS[name]
    wrapped = {"eager": ours, "jit": jax.jit(ours), "remat": jax.checkpoint(ours)}[how]
    points, directions, _ = arguments()
    with jax.enable_x64(True):
        y, dy = jax.jvp(wrapped, tuple(map(jnp.asarray, points)), tuple(directions))
        tensors, tangents = (tuple(map(torch.tensor, a)) for a in (points, directions))
        expected, dexpected = torch.autograd.functional.jvp(theirs, tensors, tangents)
        assert_same(y, expected)
        assert_same(dy, dexpected, size=np.abs(points[1]).max() * np.abs(directions[0]).max())


def second_derivatives(ours: Norm) -> tuple[object, object]:
    """Returns the Hessian of a cotangent's product with a norm along a direction, both ways."""
    points, directions, cotangent = arguments()
    gradient = jax.grad(lambda *p: jnp.sum(jnp.tanh(ours(*p)) * cotangent), argnums=(0, 1, 2))
    arrays, along = tuple(map(jnp.asarray, points)), tuple(directions)
    _, forward = jax.jvp(gradient, arrays, along)
    _, back = jax.vjp(gradient, *arrays)
    return forward, back(along)


def torch_second_derivatives(theirs: TorchNorm) -> tuple[torch.Tensor, ...]:
    points, directions, cotangent = arguments()
    tensors = [torch.tensor(p, requires_grad=True) for p in points]
    loss = (torch.tanh(theirs(*tensors)) * torch.tensor(cotangent)).sum()
    gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    product = sum((g * torch.tensor(d)).sum() for g, d in zip(gradients, directions, strict=True))
    return torch.autograd.grad(product, tensors)


def assert_second_derivatives(ours: Norm, theirs: TorchNorm) -> None:
    expected = torch_second_derivatives(theirs)
    size = max(float(e.abs().max()) for e in expected)
    with jax.enable_x64(True):
        for found in second_derivatives(ours):
            for a, b in zip(found, expected, strict=True):
                assert_same(a, b, size=size)


@pytest.mark.parametrize("name", TWINS)
def test_second_derivatives_are_torchs(name: str) -> None:
    assert_second_derivatives(*TWINS[name])


def test_second_derivatives_notice_statistics_that_count_as_constants() -> None:
    def halted(x: Array, g: Array, b: Array) -> Array:
        found = jax.lax.stop_gradient(functional.moments(x, (0, 1, 2)))
        return functional.normalize(x, found, g, b, eps=1e-5)

    with pytest.raises(AssertionError, match="above the bound"):
        assert_second_derivatives(halted, TWINS["batch"][1])


def test_second_derivatives_know_the_mask() -> None:
    """Against the kept rows alone."""
    x, cotangent = values(6, 3), values(6, 3, seed=1, offset=0.5)
    direction = values(6, 3, seed=2, offset=0.5)
    mask = np.array([True, False, True, True, False, True])
    norm = lambda x, **options: functional.batch_norm(x, **options)[0]  # noqa: E731

    def product(norm: Callable[[Array], Array], rows: object) -> Array:
        loss = lambda x: jnp.sum(jnp.tanh(norm(x)) * cotangent[rows])  # noqa: E731
        return jax.jvp(jax.grad(loss), (jnp.asarray(x[rows]),), (direction[rows],))[1]

    with jax.enable_x64(True):
        masked = product(partial(norm, mask=mask[:, None]), slice(None))
        alone = product(norm, mask)
        assert_same(masked[mask], alone)
        assert not np.any(masked[~mask])
