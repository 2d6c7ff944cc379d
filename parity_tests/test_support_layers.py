"""The checks of ``support.layers`` can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests.support.cases import values
from parity_tests.support.contracts import narrowings
from parity_tests.support.layers import assert_same, assert_twins, image

ONE = np.ones(3)
NAN = np.array([1.0, np.nan, 1.0])


@pytest.mark.parametrize(
    "wrong",
    [ONE[:2], np.ones((3, 1)), ONE.astype("float32"), NAN, ONE * np.inf, ONE + 1.1e-12],
    ids=["short", "shape", "dtype", "nan", "infinity", "distance"],
)
def test_assert_same_sees(wrong: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        assert_same(wrong, ONE)


def test_assert_same_wants_nan_where_the_oracle_has_it() -> None:
    assert_same(NAN, NAN)
    with pytest.raises(AssertionError):
        assert_same(ONE, NAN)


def test_assert_same_refuses_to_judge_float32() -> None:
    with pytest.raises(AssertionError):
        assert_same(ONE.astype("float32"), ONE.astype("float32"))


def test_assert_same_measures_in_the_given_size() -> None:
    assert_same(ONE + 1e-9, ONE, size=1e4)


def test_assert_twins_sees_a_wrong_output() -> None:
    with pytest.raises(AssertionError, match="above the bound"):
        assert_twins(lambda x: x * 2, lambda x: x * (2 + 1e-10), values(3))


def test_assert_twins_sees_a_wrong_gradient_behind_a_right_output() -> None:
    with pytest.raises(AssertionError, match="above the bound"):
        assert_twins(lambda x: x * 2, lambda x: x * 2 + (x - x.detach()), values(3))


def test_assert_twins_sees_a_function_that_computes_in_float32() -> None:
    with pytest.raises(AssertionError, match="float32"):
        assert_twins(lambda x: jnp.asarray(x, jnp.float32), lambda x: x, values(3))


def test_image_moves_the_channels_there_and_back() -> None:
    x = torch.tensor(values(2, 3, 4, 5))
    seen = []
    y = image(lambda t: (seen.append(t.shape), t)[1])(x)
    assert seen == [(2, 5, 3, 4)]
    assert torch.equal(x, y)


def test_narrowings_are_seen_also_inside_jit() -> None:
    def planted(x: jax.Array) -> object:
        return jax.jit(lambda x: jnp.asarray(jnp.asarray(x, jnp.float32), jnp.float64))(x)

    with jax.enable_x64(True):
        assert len(narrowings(jax.make_jaxpr(planted)(np.ones(3)))) == 2
        assert narrowings(jax.make_jaxpr(lambda x: x * 2)(np.ones(3))) == []
