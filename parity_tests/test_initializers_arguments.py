"""Initializers: arguments that are no numbers, axes or dtypes of theirs, and 16-bit bounds."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import initializers
from flaxstab._typing import Initializer

KEY = jax.random.key(0, impl="rbg")  # compiles in a quarter of the time of the default
BOUNDS = [(0.0, 0.3003), (-0.3003, 0.3003), (-3.0, 5.0), (1.0, 1.0)]


def moved(
    law: Initializer, shape: tuple[int, ...], low: np.generic, high: np.generic
) -> np.ndarray:
    """Returns float32 draws in the bounds' dtype, those that round up to ``high`` moved."""
    cast = np.asarray(law(KEY, shape)).astype(high.dtype)
    assert (cast == high).any()
    return np.where(cast == high, low, cast)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounds_up_to_a_16_bit_bound_becomes_the_lower_one_as_in_torch(dtype: str) -> None:
    """Also under jit, where XLA may skip a rounding. Twenty draws or more round to each bound."""
    count, kind = 200_000, jnp.dtype(dtype)
    laws = [initializers.uniform(a, b) for a, b in BOUNDS]
    jitted = jax.jit(lambda key: [law(key, (count,), dtype) for law in laws])(KEY)
    for (a, b), law, compiled in zip(BOUNDS, laws, jitted, strict=True):
        low, high = (np.asarray(bound, np.float32).astype(kind) for bound in (a, b))
        np.testing.assert_array_equal(compiled, moved(law, (count,), low, high))
        np.testing.assert_array_equal(law(KEY, (count,), dtype), compiled)
        theirs = torch.empty(count, dtype=getattr(torch, dtype)).uniform_(a, b).double()
        assert theirs.max() == float(compiled.max())
        assert theirs.min() == float(compiled.min())


SHAPED = {  # its options, and the bound for fans of 300 and 700
    "xavier_uniform": ({"gain": 2.0}, 2 * math.sqrt(6 / 1000)),
    "kaiming_uniform": ({"mode": "fan_out"}, math.sqrt(6 / 700)),
    "torch_weight": ({}, math.sqrt(1 / 300)),
    "torch_attention": ({}, math.sqrt(6 / (300 + 3 * 700))),
}


@pytest.mark.parametrize("name", SHAPED)
def test_16_bit_kernels_never_reach_their_bound(name: str) -> None:
    options, bound = SHAPED[name]
    law, shape = getattr(initializers, name)(**options), (300, 700)
    low, high = (np.asarray(b, np.float32).astype(jnp.bfloat16) for b in (-bound, bound))
    np.testing.assert_array_equal(law(KEY, shape, "bfloat16"), moved(law, shape, low, high))


def test_bounds_outside_the_dtype_are_refused_as_by_torch() -> None:
    for bounds in [(-math.inf, math.inf), (0.0, math.inf), (math.nan, 1.0)]:
        with pytest.raises(
            ValueError, match=r"a and b must be finite, got a=.* and b=(inf|1\.0)\."
        ):
            initializers.uniform(*bounds)
        with pytest.raises(RuntimeError):
            torch.empty(3).uniform_(*bounds)
    for dtype, bounds in [("float16", (0.0, 7e4)), ("float32", (-3e38, 3e38))]:
        with pytest.raises(ValueError, match=r"a, b and b - a must lie in \[-.*\], got a="):
            initializers.uniform(*bounds)(KEY, (3,), dtype)
        with pytest.raises(RuntimeError):
            torch.empty(3, dtype=getattr(torch, dtype)).uniform_(*bounds)


NAMES = {
    "uniform": "a", "normal": "mean", "trunc_normal": "mean", "xavier_uniform": "gain",
    "xavier_normal": "gain", "kaiming_uniform": "a", "kaiming_normal": "a", "constant": "value",
    "sparse": "sparsity", "orthogonal": "gain",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_initializer_that_was_not_called_says_so(name: str) -> None:
    rule = rf"^{NAMES[name]} must be a number, got {NAMES[name]}=<class '[\w.]*'>\. Call it first: "
    for key in (KEY, np.zeros(2, np.uint32), jax.random.PRNGKey(0)):
        with pytest.raises(ValueError, match=rf"{rule}kernel_init={name}\("):
            getattr(initializers, name)(key)


@pytest.mark.parametrize("name", ["kaiming_normal", "kaiming_uniform", "trunc_normal"])
def test_a_layer_given_one_that_was_not_called_says_so(name: str) -> None:
    """The others take fewer arguments than a layer passes: Python's own TypeError names them."""
    with pytest.raises(ValueError, match=rf"Call it first: kernel_init={name}\(\)\.$"):
        nnx.Linear(3, 3, kernel_init=getattr(initializers, name), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["xavier_uniform", "xavier_normal", "orthogonal"])
def test_a_gain_by_name_is_refused(name: str) -> None:
    rule = r"gain must be a number, got gain='relu'\. Use calculate_gain\('relu'\)\."
    with pytest.raises(ValueError, match=rule):
        getattr(initializers, name)("relu")


def test_numbers_of_every_kind_are_taken() -> None:
    for value in (2, 2.0, np.float32(2), np.int64(2), np.array(2.0), jnp.asarray(2.0)):
        assert initializers.constant(value)(KEY, (1,)).item() == 2
        assert initializers.uniform(value, value)(KEY, (1,)).item() == 2
    for value in (1j, "2", None, [2.0], np.ones(1), np.array(1j)):
        with pytest.raises(ValueError, match="value must be a number, got value="):
            initializers.constant(value)
    initializers.kaiming_normal(None)
    torch.nn.init.kaiming_normal_(torch.empty(2, 2), None)


@pytest.mark.parametrize("fan", [-3, 3.5, True, "3"])
def test_a_fan_is_an_integer_of_at_least_0(fan: object) -> None:
    with pytest.raises(ValueError, match=rf"fan_in must be an integer of at least 0, got .*{fan}"):
        initializers.torch_bias(fan)
    assert not initializers.torch_bias(0)(KEY, (3,)).any()
    assert initializers.torch_bias(np.int64(4))(KEY, (3,)).any()


RANDOM: list[Initializer] = [
    initializers.uniform(), initializers.normal(), initializers.trunc_normal(),
    initializers.sparse(0.5), initializers.orthogonal(), initializers.xavier_uniform(),
    initializers.kaiming_normal(), initializers.torch_embedding(), initializers.torch_attention(),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_random_laws_need_a_floating_point_dtype(dtype: str) -> None:
    for law in RANDOM:
        with pytest.raises(ValueError, match=rf"floating-point dtype, got dtype='{dtype}'"):
            law(KEY, (3, 3), dtype)
    assert initializers.ones(KEY, (3,), "int32").dtype == "int32"


# What is called on which shape, and the rule.
BAD_AXES: list[tuple[Callable[..., Initializer], dict[str, object], tuple[int, ...], str]] = [
    (initializers.dirac, {"in_axis": -1}, (3, 2, 2), "in_axis and out_axis must be different axes"),
    (initializers.dirac, {"in_axis": 3}, (3, 2, 2), "in_axis and out_axis must be different axes"),
    (
        initializers.dirac,
        {"out_axis": -4},
        (3, 2, 2),
        "in_axis and out_axis must be different axes",
    ),
    (initializers.dirac, {"out_axis": 1.0}, (3, 2, 2), "in_axis and out_axis must be different"),
    (
        initializers.orthogonal,
        {"out_axis": 2},
        (3, 2),
        "out_axis must be an axis of the shape, got",
    ),
    (initializers.orthogonal, {"out_axis": None}, (3, 2), "out_axis must be an axis of the shape"),
    (
        initializers.xavier_normal,
        {"in_axis": None},
        (3, 2),
        "in_axis and out_axis must be different",
    ),
    (initializers.xavier_normal, {"out_axis": 0.5}, (3, 2), "in_axis and out_axis must be differ"),
]


@pytest.mark.parametrize(("make", "axes", "shape", "rule"), BAD_AXES)
def test_axes_that_a_shape_does_not_have_are_refused(
    make: Callable[..., Initializer], axes: dict[str, object], shape: tuple[int, ...], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        make(**axes)(KEY, shape)


def test_sparse_and_embeddings_without_their_axis_are_refused() -> None:
    rule = r"out_axis must be an axis of the shape, got out_axis=2 and shape=\(3, 2\)\."
    with pytest.raises(ValueError, match=rule):
        initializers.sparse(0.5, out_axis=2)(KEY, (3, 2))
    with pytest.raises(
        ValueError, match=r"a row of the embedding, got padding_idx=0 and shape=\(\)"
    ):
        initializers.torch_embedding(0)(KEY, ())


def test_axes_may_be_numpys_integers() -> None:
    zero, one = np.int64(0), np.int64(1)
    fans = initializers.fan_in_and_fan_out
    assert fans((5, 3, 7), in_axis=zero, out_axis=one) == (35, 21)
    assert fans((5, 3, 7), in_axis=(zero, one), out_axis=np.int64(-1)) == (15, 7)
    found = initializers.xavier_normal(in_axis=one, out_axis=zero)(KEY, (5, 3, 7))
    np.testing.assert_array_equal(
        found, initializers.xavier_normal(in_axis=1, out_axis=0)(KEY, (5, 3, 7))
    )


def test_the_axes_of_flaxs_transposed_kernels_are_as_the_docs_say() -> None:
    """PyTorch's fan is that of the outputs, 9 * 256: a standard deviation of 0.0120."""
    exchanged = initializers.torch_weight(in_axis=-1, out_axis=-2)
    for law, transposed in [(exchanged, False), (initializers.torch_weight(), True)]:
        layer = nnx.eval_shape(
            lambda t=transposed: nnx.ConvTranspose(
                64, 256, (3, 3), transpose_kernel=t, rngs=nnx.Rngs(0)
            )
        )
        bound = 1 / math.sqrt(9 * 256)
        largest = float(np.abs(law(KEY, layer.kernel.shape)).max())
        assert 0.999 * bound < largest <= bound
