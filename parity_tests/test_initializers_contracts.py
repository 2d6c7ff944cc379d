"""Initializers: what holds for every one: dtypes, transformations, layers, empty shapes."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from flaxstab import initializers

Shape = tuple[int, ...]
KEY = jax.random.key(0)

VECTOR = ("zeros", "ones", "constant", "uniform", "normal", "trunc_normal", "torch_bias",
          "torch_recurrent")  # fmt: skip
EVERY = {
    "zeros": initializers.zeros,
    "ones": initializers.ones,
    "constant": initializers.constant(0.1),
    "eye": initializers.eye(),
    "dirac": initializers.dirac(),
    "uniform": initializers.uniform(),
    "normal": initializers.normal(0.5, 2.0),
    "trunc_normal": initializers.trunc_normal(1.0, 2.0, 0.5, 4.0),
    "sparse": initializers.sparse(0.5),
    "xavier_uniform": initializers.xavier_uniform(),
    "xavier_normal": initializers.xavier_normal(),
    "kaiming_uniform": initializers.kaiming_uniform(),
    "kaiming_normal": initializers.kaiming_normal(),
    "orthogonal": initializers.orthogonal(1.5),
    "torch_weight": initializers.torch_weight(),
    "torch_bias": initializers.torch_bias(9),
    "torch_embedding": initializers.torch_embedding(0),
    "torch_attention": initializers.torch_attention(),
    "torch_recurrent": initializers.torch_recurrent(9),
}
FIXED = ("zeros", "ones", "constant", "eye", "dirac")


def shape_for(name: str) -> Shape:
    return (3, 8, 9) if name == "dirac" else (8, 9)


def compiled(dtype: str) -> dict[str, np.ndarray]:
    """Two draws of each under ``vmap`` under ``jit``, compiled together."""

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> dict[str, jax.Array]:
        return {name: init(key, shape_for(name), dtype) for name, init in EVERY.items()}

    return {name: np.asarray(drawn) for name, drawn in run(jax.random.split(KEY)).items()}


@pytest.fixture(scope="module")
def float32() -> dict[str, np.ndarray]:
    return compiled("float32")


@pytest.fixture(scope="module")
def float64() -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return compiled("float64")


def test_every_initializer_is_in_the_table() -> None:
    helpers = {"calculate_gain", "fan_in_and_fan_out"}
    functions = {n for n, v in vars(initializers).items() if inspect.isfunction(v)}
    assert functions - helpers == set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_low_precision_is_drawn_in_float32_and_cast(name: str) -> None:
    """None of these few draws rounds up to a bound, see ``test_initializers_arguments``."""
    wide = EVERY[name](KEY, shape_for(name))
    for dtype in ("bfloat16", "float16"):
        low = EVERY[name](KEY, shape_for(name), dtype)
        assert low.dtype == dtype
        np.testing.assert_array_equal(low, jnp.asarray(wide, dtype))


@pytest.mark.parametrize("name", EVERY)
def test_float64_is_drawn_in_float64(name: str, float64: dict[str, np.ndarray]) -> None:
    found, again = float64[name]
    assert found.dtype == np.float64
    random = name not in FIXED
    assert bool((np.asarray(found, np.float32) != found).any()) is (random or name == "constant")
    assert bool((found != again).any()) is random


def test_the_default_is_float32_also_with_x64() -> None:
    with jax.enable_x64(True):
        drawn = [
            jax.eval_shape(lambda key, n=name: EVERY[n](key, shape_for(n)), KEY) for name in EVERY
        ]
    assert {str(each.dtype) for each in drawn} == {"float32"}


@pytest.mark.parametrize("name", EVERY)
def test_initializers_serve_every_layer(name: str) -> None:
    init = EVERY[name]
    bias = init if name in VECTOR else initializers.zeros
    options = {"kernel_init": init, "bias_init": bias}
    if name not in ("eye", "sparse"):
        conv = nnx.eval_shape(lambda: nnx.Conv(6, 4, (3, 2), **options, rngs=nnx.Rngs(0)))
        params = jax.eval_shape(linen.Conv(4, (3,), **options).init, KEY, jnp.ones((1, 5, 6)))
        assert (conv.kernel.shape, conv.bias.shape) == ((3, 2, 6, 4), (4,))
        assert params["params"]["kernel"].shape == (3, 6, 4)
    if name != "dirac":
        dense = nnx.eval_shape(lambda: nnx.Linear(6, 4, **options, rngs=nnx.Rngs(0)))
        params = jax.eval_shape(linen.Dense(4, **options).init, KEY, jnp.ones((1, 6)))
        assert (dense.kernel.shape, dense.bias.shape) == ((6, 4), (4,))
        assert params["params"]["kernel"].shape == (6, 4)


def test_a_layer_is_given_what_the_initializer_draws() -> None:
    rngs = nnx.Rngs(0)
    key = nnx.clone(rngs).params()
    layer = nnx.Linear(8, 9, kernel_init=EVERY["orthogonal"], rngs=rngs)
    np.testing.assert_array_equal(layer.kernel[...], EVERY["orthogonal"](key, (8, 9)))


@pytest.mark.parametrize("name", EVERY)
def test_jit_and_vmap_do_not_change_the_draw(name: str, float32: dict[str, np.ndarray]) -> None:
    """To rounding: under jit XLA may fuse two operations, and joins two constant factors."""
    drawn = [EVERY[name](key, shape_for(name)) for key in jax.random.split(KEY)]
    eager = np.stack(drawn).astype(np.float64)
    bound = 2 * np.finfo(np.float32).eps * np.abs(eager).max()
    np.testing.assert_allclose(float32[name], eager, rtol=0, atol=bound)
    assert bool((eager[0] != eager[1]).any()) is (name not in FIXED)


# PyTorch's functions that leave tensors without elements alone, some with a warning.
EMPTY = {
    "eye": [(0, 5), (5, 0)],
    "dirac": [(2, 0, 5), (2, 5, 0)],
    "sparse": [(0, 5), (5, 0)],
    "orthogonal": [(0, 5), (5, 0), (0, 3, 4)],
    "xavier_uniform": [(0, 5), (5, 0)],
    "xavier_normal": [(0, 5), (5, 0)],
    "kaiming_uniform": [(0, 5), (5, 0), (0, 3, 4)],
    "kaiming_normal": [(0, 5), (5, 0), (0, 3, 4)],
    "uniform": [(0,), (5, 0)],
    "normal": [(0,), (5, 0)],
    "trunc_normal": [(0,), (5, 0)],
}


@pytest.mark.parametrize("name", EMPTY)
def test_shapes_without_elements_are_fine_as_in_torch(name: str) -> None:
    arguments = (0.5,) if name == "sparse" else ()
    for shape in EMPTY[name]:
        assert jax.eval_shape(lambda key, s=shape: EVERY[name](key, s), KEY).shape == shape
        weight = torch.empty(shape[-1:] + shape[-2:-1] + shape[:-2])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
            assert getattr(torch.nn.init, f"{name}_")(weight, *arguments) is weight


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("xavier_uniform", (0, 3, 4), ZeroDivisionError),
        ("xavier_normal", (0, 0), ZeroDivisionError),
        ("dirac", (0, 3, 4), IndexError),
    ],
)
def test_empty_windows_that_torch_stumbles_over_are_fine(
    name: str, shape: Shape, error: type[Exception]
) -> None:
    assert EVERY[name](KEY, shape).shape == shape
    with pytest.raises(error):
        getattr(torch.nn.init, f"{name}_")(torch.empty(shape[-1:] + shape[-2:-1] + shape[:-2]))
