"""The transposed convolution against PyTorch."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import functional, initializers, linear
from flaxstab.parity import Budget, HasCdf, HasMean, Report, compare
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same

RNGS = nnx.Rngs(0)
SPACE = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}
LAYER = {
    1: torch.nn.ConvTranspose1d,
    2: torch.nn.ConvTranspose2d,
    3: torch.nn.ConvTranspose3d,
}


def compared(*args: object, space: tuple[int, ...] | None = None, **options: object) -> Report:
    """Compares both layers, built with the same arguments, in float64."""
    window = args[2]
    rank = 2 if isinstance(window, int) else len(window)
    x = values(2, *(space or SPACE[rank]), args[0])
    return compare(
        linear.ConvTranspose(*args, **options, rngs=nnx.Rngs(0)), LAYER[rank](*args, **options),
        x, layout="image", dtypes=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((3,), {}),
        ((4, 2), {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2), "bias": False}),
        ((2, 3), {"dilation": (3, 2), "padding": (1, 2), "output_padding": (2, 1), "groups": 2}),
        ((1, 2), {"stride": (3, 1), "padding": (0, 2)}),  # more cut off than the window reaches
        ((3,), {"stride": 2, "padding": 1, "groups": 4}),
        ((2, 1, 3), {"stride": (2, 1, 2), "padding": (0, 0, 1), "output_padding": (1, 0, 0)}),
    ],
    ids=str,
)
def test_conv_transpose_is_torchs(window: object, options: dict[str, object]) -> None:
    report = compared(4, 8, window, **options)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("window", "options", "space"),
    [
        ((4, 2), {"stride": (3, 2), "padding": 1}, (3, 5)),  # the output aborts
        ((4, 1), {"stride": (2, 3), "padding": (3, 0), "dilation": (1, 2), "groups": 2}, (3, 9)),
    ],
    ids=["output", "kernel gradient"],
)
def test_shapes_that_abort_xla_are_worked_around(
    window: object, options: dict[str, object], space: tuple[int, ...]
) -> None:
    report = compared(4, 6, window, **options, space=space)
    assert report.passed, str(report)


def test_positional_arguments_are_torchs() -> None:
    report = compared(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, False, (2, 1), "zeros")
    assert report.passed, str(report)


def test_it_is_as_precise_as_torchs() -> None:
    args = (6, 9, 3, 2, 1, 1, 3)
    report = compare(
        linear.ConvTranspose(*args, rngs=RNGS), torch.nn.ConvTranspose2d(*args),
        values(2, 3, 4, 6), layout="image", dtypes=(np.float32, jnp.bfloat16),
    )  # fmt: skip
    assert report.passed, str(report)


@pytest.mark.parametrize("size", [(7, 9), (8, 10), (7, 10), 8])
def test_an_output_size_at_the_call_decides_the_output_padding(size: object) -> None:
    twin = torch.nn.ConvTranspose2d(2, 3, 3, 2, 1, 1).double()
    x = values(1, 4, 5 if size != 8 else 4, 2)
    with jax.enable_x64(True):
        layer = linear.ConvTranspose(2, 3, 3, 2, 1, 1, param_dtype=jnp.float64, rngs=RNGS)
        layer.kernel[...] = jnp.asarray(twin.weight.detach().permute(2, 3, 0, 1).numpy())
        layer.bias[...] = jnp.asarray(twin.bias.detach().numpy())
        y = layer(jnp.asarray(x), output_size=size)
        sizes = (size, size) if isinstance(size, int) else size
        expected = twin(torch.tensor(x).movedim(-1, 1), output_size=list(sizes)).movedim(1, -1)
        assert_same(y, expected)
        assert y.shape[1:3] == sizes


@pytest.mark.parametrize("size", [(6, 9), (7, 11)])
def test_an_output_size_out_of_reach_is_refused_as_in_torch(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="requested an output size"):
        torch.nn.ConvTranspose2d(2, 3, 3, 2, 1)(torch.ones(1, 2, 4, 5), output_size=size)
    layer = linear.ConvTranspose(2, 3, 3, 2, 1, rngs=RNGS)
    rule = r"output_size must be \(7, 9\) or larger by less than stride=\(2, 2\), got output_size="
    with pytest.raises(ValueError, match=rule):
        layer(jnp.ones((1, 4, 5, 2)), output_size=size)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_it_takes_any_number_of_batch_axes(batch: tuple[int, ...]) -> None:
    x = values(*batch, 3, 4, 2)
    with jax.enable_x64(True):
        layer = linear.ConvTranspose(2, 3, 2, param_dtype=jnp.float64, rngs=RNGS)
        weight = torch.tensor(np.array(layer.kernel[...])).permute(2, 3, 0, 1)
        bias = torch.tensor(np.array(layer.bias[...]))
        flat = torch.tensor(x.reshape(-1, 3, 4, 2)).movedim(-1, 1)
        expected = torch.nn.functional.conv_transpose2d(flat, weight, bias).movedim(1, -1)
        assert_same(layer(jnp.asarray(x)), expected.reshape(*batch, 4, 5, 3))


def test_it_is_the_input_gradient_of_the_convolution() -> None:
    """The closed form of its meaning: both take one kernel, in and out swapped."""
    with jax.enable_x64(True):
        x, y = jnp.asarray(values(1, 7, 6, 3)), jnp.asarray(values(1, 3, 3, 4, seed=1))
        kernel = jnp.asarray(values(3, 2, 3, 4, seed=2))
        _, pull = jax.vjp(lambda x: functional.conv(x, kernel, stride=2), x)
        transposed = functional.conv_transpose(
            y, kernel.swapaxes(-1, -2), stride=2, output_padding=0
        )
        assert_same(transposed, pull(y)[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear.ConvTranspose(10_000, 4, 3, rngs=nnx.Rngs(2)),
        lambda: linear.ConvTranspose(10_000, 8, (9,), groups=2, rngs=nnx.Rngs(3)),
    ],
    ids=["plain", "groups"],
)
def test_weights_start_as_torchs(make: Callable[..., object], budget: Budget) -> None:
    """U(±1 / sqrt(36)), for a group has 4 output channels and the window 9 elements.

    As in test_linear: of 360,000 weights 0.1 % lie that near to the ends. The fan of the input
    would make them 50 times smaller.
    """
    draws = 6 * np.asarray(make().kernel[...], np.float64)
    assert np.abs(draws).max() <= 1 + np.finfo(np.float32).eps
    ends = HasMean(1e-3, discrepancy=1e-3).check(np.abs(draws) > 1 - 1e-3, budget)
    law = HasCdf(lambda x: np.clip((x + 1) / 2, 0, 1), discrepancy=0.01).check(draws, budget)
    assert ends.passed, str(ends)
    assert law.passed, str(law)


def test_biases_start_as_torchs(budget: Budget) -> None:
    """U(±1 / sqrt(out * window)): torch's bound for 10,000 output channels."""
    bias = linear.ConvTranspose(1, 10_000, (4,), rngs=RNGS).bias
    assert bias is not None
    draws = np.asarray(bias[...], np.float64) * 200
    assert np.abs(draws).max() <= 1 + np.finfo(np.float32).eps
    law = HasCdf(lambda x: np.clip((x + 1) / 2, 0, 1), discrepancy=0.06).check(draws, budget)
    assert law.passed, str(law)
    theirs = torch.nn.ConvTranspose1d(1, 10_000, 4).bias.detach().numpy() * 200.0
    law = HasCdf(lambda x: np.clip((x + 1) / 2, 0, 1), discrepancy=0.06).check(theirs, budget)
    assert law.passed, str(law)


def test_kernel_and_bias_are_drawn_by_the_given_initializers() -> None:
    fill = nnx.initializers.constant
    layer = linear.ConvTranspose(
        4, 6, 3, groups=2, kernel_init=fill(2.0), bias_init=fill(3.0), rngs=RNGS
    )
    assert layer.kernel[...].shape == (3, 3, 4, 3)
    assert set(np.unique(layer.kernel[...])) == {2.0}
    assert set(np.unique(layer.bias[...])) == {3.0}
    assert linear.ConvTranspose(4, 6, 3, bias=False, rngs=RNGS).bias is None


def test_numpy_integers_and_lists_are_sizes_like_any_other() -> None:
    layer = linear.ConvTranspose(np.int64(3), 2, [3, 3], [2, np.int32(2)], [1, 1], rngs=RNGS)
    assert layer(jnp.ones((1, 4, 4, 3))).shape == (1, 7, 7, 2)
    assert isinstance(hash(nnx.graphdef(layer)), int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be an integer of at least 1"),
        ({"out_channels": 0}, "out_channels must be an integer of at least 1"),
        ({"groups": 0}, "groups must be an integer of at least 1"),
        ({"groups": 3}, "groups must divide in_channels and out_channels, got groups=3"),
        ({"in_channels": 6, "groups": 3}, "groups must divide in_channels and out_channels"),
        ({"kernel_size": 0}, "kernel_size must be an integer or 2 integers, each at least 1"),
        ({"kernel_size": ()}, "kernel_size must name one to three axes"),
        ({"kernel_size": (1, 1, 1, 1)}, "one to three axes, got kernel_size=\\(1, 1, 1, 1\\)"),
        ({"stride": 0}, "stride must be an integer or 2 integers, each at least 1"),
        ({"padding": "same"}, "padding must be an integer or 2 integers, each at least 0"),
        ({"output_padding": -1}, "output_padding must be an integer or 2 integers, each at least"),
        (
            {"output_padding": (0, 2), "stride": (4, 2)},
            r"output_padding must be smaller than stride or dilation, got output_padding=\(0, 2\) "
            r"and stride=\(4, 2\) and dilation=1\.",
        ),
        ({"dilation": (1,)}, "dilation must be an integer or 2 integers, each at least 1"),
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros', got padding_mode='reflect'"),
        ({"rngs": None}, r"needs rngs. Pass rngs=nnx.Rngs\(seed\)\."),
        ({"param_dtype": jnp.int32}, "param_dtype must be a floating-point dtype"),
        ({"dtype": jnp.int32}, "dtype must be a floating-point dtype"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: dict[str, object], message: str) -> None:
    right = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rngs": RNGS}
    with pytest.raises(ValueError, match=message):
        linear.ConvTranspose(**(right | options))


def test_torch_refuses_the_same_output_padding() -> None:
    for options in ({}, {"output_padding": 2, "stride": 2}):
        with pytest.raises(RuntimeError, match="output padding must be smaller than either"):
            torch.nn.ConvTranspose1d(1, 1, 3, **({"output_padding": 1} | options))(
                torch.ones(1, 1, 3)
            )


@pytest.mark.parametrize(
    ("padding", "shape", "message"),
    [
        (0, (1, 4, 3, 5), "last axis must have in_channels elements, got in_channels=4"),
        (0, (3, 4), "last axis must have in_channels elements"),
        (2, (1, 3, 1, 4), r"padding must leave at least one element of each axis of the output, "
         r"got padding=\(2, 2\) and kernel_size=\(3, 3\) and space=\(3, 1\)"),
        (2, (1, 2, 2, 4), "padding must leave at least one element of each axis of the output"),
        (0, (1, 3, 0, 4), "padding must leave at least one element of each axis of the output"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(
    padding: int, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear.ConvTranspose(4, 2, 3, padding=padding, rngs=RNGS)(jnp.ones(shape))
    if len(shape) == 4:
        with pytest.raises(RuntimeError):
            torch.nn.ConvTranspose2d(4, 2, 3, padding=padding)(torch.ones(shape).movedim(-1, 1))


def test_padding_may_leave_one_element() -> None:
    for args in ((3, 1, 1), (2, 2, 1, 1)):  # the latter leaves the output padding alone
        y = linear.ConvTranspose(4, 2, *args, rngs=RNGS)(jnp.ones((1, 1, 1, 4)))
        assert y.shape == (1, 1, 1, 2)
        assert torch.nn.ConvTranspose2d(4, 2, *args)(torch.ones(1, 4, 1, 1)).shape == (1, 2, 1, 1)


def test_the_function_checks_what_the_layer_checks() -> None:
    x, kernel = jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2, 2))
    with pytest.raises(ValueError, match="groups must divide in_channels, got groups=3"):
        functional.conv_transpose(x, kernel, groups=3)
    with pytest.raises(ValueError, match="output_padding must be smaller than stride or dilation"):
        functional.conv_transpose(x, kernel, output_padding=1)
    with pytest.raises(ValueError, match="last axis must have in_channels elements"):
        functional.conv_transpose(x, jnp.ones((3, 3, 4, 2)))


def test_torchs_fans_are_those_of_exchanged_axes() -> None:
    """As the docstring says: what ``torch.nn.init`` sees in its weight (in, out / groups, ...)."""
    theirs = torch.nn.ConvTranspose2d(6, 40, 3, groups=2)
    fans = torch.nn.init._calculate_fan_in_and_fan_out(theirs.weight)
    for mode, fan in zip(("fan_in", "fan_out"), fans, strict=True):
        law = initializers.kaiming_uniform(
            mode=mode, nonlinearity="linear", in_axis=-1, out_axis=-2
        )
        layer = linear.ConvTranspose(6, 40, 3, groups=2, kernel_init=law, rngs=nnx.Rngs(0))
        largest = np.abs(np.asarray(layer.kernel[...])).max() / math.sqrt(3 / fan)
        assert 0.9 < largest <= 1 + np.finfo(np.float32).eps
