"""``surgery.init_layer`` and ``surgery.redraw``: layers alone and stacked, ours and NNX's."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flaxstab import initializers, linear, norms, surgery
from flaxstab.attention import MultiHeadAttention
from torch_ref import initializers as torch_init


def state_of(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


LAYERS: dict[str, tuple[Callable[..., nnx.Module], tuple[int, int], int]] = {  # shape as a matrix
    "linear": (lambda **o: linear.Linear(60, 50, **o), (60, 50), 0),
    "conv": (lambda **o: linear.Conv(6, 60, 3, **o), (54, 60), 0),
    "grouped": (lambda **o: linear.Conv(12, 60, 3, groups=2, **o), (54, 60), 0),
    "nnx linear": (lambda **o: nnx.Linear(60, 50, **o), (60, 50), 0),
    "nnx conv": (lambda **o: nnx.Conv(6, 60, (3, 3), **o), (54, 60), 0),
    "nnx grouped": (
        lambda **o: nnx.Conv(12, 60, (3, 3), feature_group_count=2, **o), (54, 60), 0,
    ),
    "nnx general": (
        lambda **o: nnx.LinearGeneral((6, 10), (5, 10), axis=(-2, -1), **o), (60, 50), 0,
    ),
    "nnx batched": (
        lambda **o: nnx.LinearGeneral(60, 50, batch_axis={0: 3}, **o), (60, 50), 3,
    ),
}  # fmt: skip
WINDOW = {"conv": 9, "grouped": 9, "nnx conv": 9, "nnx grouped": 9}
STACK = 4
ONES = {"kernel_init": initializers.ones}  # without a draw, that is, without a compilation


def stacked(make: Callable[..., nnx.Module], *sizes: int) -> nnx.Module:
    """A layer with leading axes, as nnx.vmap over its constructor would build it."""
    layer = make(**ONES, bias_init=initializers.ones, rngs=nnx.Rngs(0))
    for _, variable in nnx.iter_graph(layer):
        if isinstance(variable, nnx.Param):
            variable.set_value(jnp.ones((*sizes, *variable.shape), variable.dtype))
    return layer


def assert_law(kernel: np.ndarray, std: float, *, uniform: bool) -> None:
    """A sample's mean and standard deviation are this far off but once in 5e8 samples."""
    n = kernel.size
    assert abs(kernel.std() - std) <= 6 * std / math.sqrt(2 * n)
    assert abs(kernel.mean()) <= 6 * std / math.sqrt(n)
    assert (np.abs(kernel).max() <= math.sqrt(3) * std * (1 + 1e-6)) == uniform


def std_of(nonlin: str, fans: tuple[int, int]) -> float:
    if nonlin in ("tanh", "sigmoid", "linear"):
        return math.sqrt(2 / sum(fans))
    slope = 0.3 if nonlin == "leaky_relu" else 0.0
    return math.sqrt(2 / (1 + slope**2) / fans[0])


GRID = [
    *[(name, "tanh", (STACK,)) for name in LAYERS],
    ("linear", "gelu", ()),
    ("nnx conv", "gelu", ()),
    ("linear", "gelu", (2, STACK)),
]


@pytest.mark.parametrize(("name", "nonlin", "sizes"), GRID)
def test_init_layer_draws_every_layer_by_its_own_fans(
    name: str, nonlin: str, sizes: tuple[int, ...]
) -> None:
    make, matrix, batch = LAYERS[name]
    layer = stacked(make, *sizes)
    shape = layer.kernel.shape
    assert np.asarray(layer.bias[...]).all()
    surgery.init_layer(layer, nonlin, 0.3, rngs=nnx.Rngs(3))
    assert layer.kernel.shape == shape
    assert not np.asarray(layer.bias[...]).any()
    fans = (matrix[0], matrix[1] * WINDOW.get(name, 1))
    kernels = np.asarray(layer.kernel[...]).reshape(-1, *matrix)
    assert len(kernels) == math.prod(sizes) * max(batch, 1)
    for kernel in kernels:
        assert_law(kernel, std_of(nonlin, fans), uniform=nonlin == "tanh")
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


NONLIN = ["tanh", "sigmoid", "linear", "relu", "leaky_relu", "gelu", "selu", "silu"]


@pytest.mark.parametrize("nonlin", NONLIN)
def test_init_layer_has_torch_refs_law_for_every_activation(nonlin: str) -> None:
    torch.manual_seed(0)
    ours, theirs = linear.Linear(60, 50, rngs=nnx.Rngs(0)), torch.nn.Linear(60, 50)
    surgery.init_layer(ours, nonlin, 0.3, rngs=nnx.Rngs(0))
    torch_init.init_layer(theirs, nonlin, 0.3)
    uniform = nonlin in ("tanh", "sigmoid", "linear")
    for kernel in (ours.kernel[...], theirs.weight.detach().numpy()):
        assert_law(np.asarray(kernel), std_of(nonlin, (60, 50)), uniform=uniform)


def test_another_law_and_the_fan_of_the_stack_are_found() -> None:
    """The faults: Xavier for Kaiming, and a kernel with its leading axis drawn as one."""
    key, shape = jax.random.key(0), (STACK, 60, 50)
    right = math.sqrt(2 / 60)
    he, xavier = initializers.kaiming_normal(nonlinearity="relu"), initializers.xavier_uniform()
    assert_law(np.asarray(he(key, shape[1:])), right, uniform=False)
    with pytest.raises(AssertionError):
        assert_law(np.asarray(xavier(key, shape[1:])), right, uniform=False)
    with pytest.raises(AssertionError):
        assert_law(np.asarray(he(key, shape)), right, uniform=False)


def test_by_default_the_activation_is_relu_and_the_slope_torch_refs() -> None:
    def kernel(*arguments: object) -> np.ndarray:
        layer = linear.Linear(6, 5, rngs=nnx.Rngs(0))
        surgery.init_layer(layer, *arguments, rngs=nnx.Rngs(3))
        return np.asarray(layer.kernel[...])

    np.testing.assert_array_equal(kernel(), kernel("relu"))
    np.testing.assert_array_equal(kernel("leaky_relu"), kernel("leaky_relu", 0.01))
    assert (kernel("leaky_relu", 0.2) != kernel("leaky_relu")).all()


UNTOUCHED = {
    "conv 1d": lambda r: linear.Conv(2, 3, (3,), **ONES, rngs=r),
    "conv 3d": lambda r: linear.Conv(2, 3, (3, 3, 3), **ONES, rngs=r),
    "nnx conv 1d": lambda r: nnx.Conv(2, 3, 3, **ONES, rngs=r),
    "transposed": lambda r: linear.ConvTranspose(2, 3, 3, **ONES, rngs=r),
    "nnx transposed": lambda r: nnx.ConvTranspose(2, 3, (3, 3), **ONES, rngs=r),
    "embedding": lambda r: nnx.Embed(2, 3, rngs=r),
    "norm": lambda r: nnx.BatchNorm(3, rngs=r),
    "attention": lambda r: MultiHeadAttention(4, 2, add_bias_kv=True, rngs=r),
    "nnx attention": lambda r: nnx.MultiHeadAttention(2, 4, **ONES, rngs=r),
}


@pytest.mark.parametrize("make", UNTOUCHED.values(), ids=UNTOUCHED)
def test_init_layer_leaves_other_modules_alone(make: Callable[[nnx.Rngs], nnx.Module]) -> None:
    module = make(nnx.Rngs(0))
    before, rngs = state_of(module), nnx.Rngs(1)
    surgery.init_layer(module, rngs=rngs)
    for a, b in zip(state_of(module), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(rngs.default.count[...]) == 0


def test_a_layer_without_bias_gets_its_kernel() -> None:
    layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    before = layer.kernel[...]
    surgery.init_weights(
        layer, functools.partial(surgery.init_layer, nonlin="gelu"), rngs=nnx.Rngs(1)
    )
    assert (layer.kernel[...] != before).all()
    assert layer.bias is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_dtype_of_a_parameter_is_kept(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        layer = linear.Linear(60, 50, param_dtype=dtype, rngs=nnx.Rngs(0))
        surgery.init_layer(layer, "tanh", rngs=nnx.Rngs(1))
        assert layer.kernel[...].dtype == layer.bias[...].dtype == dtype
        if dtype == "float64":
            wide = np.asarray(layer.kernel[...])
            assert (wide != wide.astype(np.float32)).mean() > 0.9  # drawn in float64
        surgery.redraw(layer, "bias", lambda *given: jnp.ones(given[1]), rngs=nnx.Rngs(2))
        assert layer.bias[...].dtype == dtype


def test_redraw_draws_an_orthogonal_matrix_for_each_layer_of_a_stack() -> None:
    layer = stacked(functools.partial(nnx.LinearGeneral, 6, (2, 3)), STACK)

    def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
        return jax.random.orthogonal(key, shape[0], dtype=dtype)

    surgery.redraw(layer, "kernel", orthogonal, rngs=nnx.Rngs(0))
    for kernel in np.asarray(layer.kernel[...], np.float64).reshape(STACK, 6, 6):
        error = np.abs(kernel @ kernel.T - np.eye(6)).max()
        assert error <= 64 * np.finfo(np.float32).eps  # 6 products of float32 and a QR


def test_redraw_is_the_initializer_itself_for_a_single_layer() -> None:
    def numpys(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
        draw = np.random.default_rng(np.asarray(jax.random.key_data(key))).normal(size=shape)
        return jnp.asarray(draw, dtype)

    rngs = nnx.Rngs(0)
    for layer, name in (
        (nnx.Embed(5, 3, rngs=rngs), "embedding"),
        (linear.Embed(5, 3, rngs=rngs), "embedding"),
        (linear.ConvTranspose(4, 6, 3, groups=2, **ONES, rngs=rngs), "kernel"),
        (nnx.ConvTranspose(2, 3, (3, 3), **ONES, rngs=rngs), "kernel"),
        (linear.Conv(2, 3, 3, **ONES, rngs=rngs), "bias"),
    ):
        held = vars(layer)[name]
        expected = numpys(nnx.Rngs(4).params(), held.shape, jnp.float32)
        surgery.redraw(layer, name, numpys, rngs=nnx.Rngs(4))
        np.testing.assert_array_equal(held[...], expected)


def test_a_sharded_parameter_stays_where_it_is() -> None:
    place = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec(None, "x"))
    layer = linear.Linear(4, 6, rngs=nnx.Rngs(0))
    plain = linear.Linear(4, 6, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jax.device_put(layer.kernel[...], place))
    for each in (layer, plain):
        surgery.init_layer(each, rngs=nnx.Rngs(1))
    assert layer.kernel[...].sharding == place
    assert not plain.kernel[...].committed
    np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])


def _behind(rngs: nnx.Rngs) -> nnx.Module:
    layer = nnx.Linear(2, 3, rngs=rngs)
    layer.kernel.set_value(jnp.ones((2, STACK, 3)))
    return layer


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (
            lambda r: linear.Linear(2, 3, rngs=r), "weight",
            "name must be a variable that the layer holds, got name='weight' and a Linear with "
            "kernel, bias",
        ),
        (lambda r: linear.Linear(2, 3, bias=False, rngs=r), "bias", "a Linear with kernel"),
        (lambda _: nnx.Sequential(), "kernel", "a Sequential with none"),
        (
            lambda _: norms.LayerNorm(2), "scale",
            "redraw must know a variable's shape, .* got name='scale' and module_type='LayerNorm'. "
            r"Set module\.scale\[\.\.\.\] yourself\.$",
        ),
        (
            _behind, "kernel",
            r"kernel of stacked layers must end in the shape of a single one, \(2, 3\), got "
            r"shape=\(2, 4, 3\)\. Stack along the first axis",
        ),
    ],
)  # fmt: skip
def test_redraw_names_what_it_cannot_draw(
    make: Callable[[nnx.Rngs], nnx.Module], name: str, message: str
) -> None:
    layer = make(nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        surgery.redraw(layer, name, initializers.normal(), rngs=nnx.Rngs(1))


def test_a_stack_on_another_axis_that_its_sizes_hide_is_drawn_as_one_in_front() -> None:
    """The limit that redraw's docstring states."""
    build = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs), out_axes=1)
    layer = build(nnx.Rngs(0).split(3))
    surgery.redraw(layer, "kernel", initializers.eye(), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.kernel[...], np.tile(np.eye(3), (3, 1, 1)))


NO_SOURCE = [
    (0, "got int"),
    (jax.random.key(0), "got ArrayImpl|got PRNGKeyArray"),
    (nnx.Rngs(dropout=0), r"got \['dropout'\]"),
]


@pytest.mark.parametrize(("rngs", "got"), NO_SOURCE, ids=["int", "key", "no params"])
def test_what_is_no_source_of_keys_is_refused_in_one_wording(rngs: object, got: str) -> None:
    layer, draw = linear.Linear(2, 2, rngs=nnx.Rngs(0)), initializers.normal()
    message = rf"rngs must be nnx\.Rngs with a 'params' stream or a default one, ({got})\. Pass nnx"
    for use in (
        lambda: surgery.redraw(layer, "kernel", draw, rngs=rngs),
        lambda: surgery.init_layer(layer, rngs=rngs),
        lambda: surgery.init_weights(layer, surgery.init_layer, rngs=rngs),
        lambda: linear.Linear(2, 2, rngs=rngs),
        lambda: linear.Embed(2, 2, rngs=rngs),
    ):
        with pytest.raises(ValueError, match=message):
            use()
