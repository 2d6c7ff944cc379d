"""L1 and L2 penalties, whole and by mask, against PyTorch's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import functional, linear, norms, optim
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, assert_twins
from torch_ref import functional as reference

PENALTIES = {
    "l1_penalty": (functional.l1_penalty, reference.l1_penalty),
    "l2_penalty": (functional.l2_penalty, reference.l2_penalty),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_and_its_gradient_are_torchs(name: str) -> None:
    ours, theirs = PENALTIES[name]
    arrays = (values(3, 4, offset=0.0), values(5, seed=1) * (np.arange(5) != 2), values(2, 3, 2))
    assert arrays[1][2] == 0  # where |x| has no slope: 0 in both
    assert_twins(ours, lambda *tensors: theirs(tensors), *arrays)


class Net(nnx.Module):
    """A layer of each role."""

    def __init__(self) -> None:
        self.lin = linear.Linear(4, 3, param_dtype=np.float64, rngs=nnx.Rngs(0))
        self.norm = norms.BatchNorm(3, param_dtype=np.float64)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_mask_leaves_out_what_does_not_decay(name: str) -> None:
    ours, theirs = PENALTIES[name]
    with jax.enable_x64(True):
        model = Net()
        params, mask = nnx.state(model, nnx.Param), optim.decay_mask(model)
        kernel = torch.tensor(np.asarray(model.lin.kernel[...]), requires_grad=True)
        expected = theirs([kernel])
        (slope,) = torch.autograd.grad(expected, kernel)
        pure = nnx.to_pure_dict(params)
        for tree, given in ((params, mask), (pure, mask), (pure, mask(pure))):
            penalty, gradient = jax.value_and_grad(lambda t, given=given: ours(t, mask=given))(tree)
            assert_same(penalty, expected)
            leaves = dict(jax.tree_util.tree_leaves_with_path(gradient))
            for path, leaf in leaves.items():
                is_kernel = "kernel" in jax.tree_util.keystr(path)
                assert_same(leaf, slope if is_kernel else np.zeros(leaf.shape))
        assert_same(
            ours(model.norm.scale[...], model.lin.kernel[...], mask=(False, True)), expected
        )


def test_the_gradient_of_the_l2_penalty_is_torchs_weight_decay() -> None:
    parameter = torch.nn.Parameter(torch.tensor(values(4)))
    parameter.grad = torch.zeros_like(parameter)
    before = parameter.detach().numpy().copy()
    torch.optim.SGD([parameter], lr=1.0, weight_decay=0.01).step()
    with jax.enable_x64(True):
        decay = jax.grad(lambda p: 0.01 * functional.l2_penalty(p))(jnp.asarray(before))
        assert_same(before - decay, parameter.detach())


@pytest.mark.parametrize("penalty", [functional.l1_penalty, functional.l2_penalty])
def test_penalties_run_in_float32_or_wider(penalty: Callable[..., jax.Array]) -> None:
    """1024 ones in bfloat16 arithmetic stay 256."""
    assert penalty(jnp.ones(1024, jnp.bfloat16)).dtype == jnp.float32
    assert penalty(jnp.ones(1024, jnp.bfloat16)).item() in (512.0, 1024.0)
    for nothing in (penalty(), penalty({}), penalty({"a": None})):
        assert nothing.item() == 0.0


@pytest.mark.parametrize("penalty", [functional.l1_penalty, functional.l2_penalty])
def test_penalties_add_parameters_of_different_dtypes(penalty: Callable[..., jax.Array]) -> None:
    with jax.numpy_dtype_promotion("strict"):
        mixed = penalty(jnp.ones(4, jnp.bfloat16), jnp.ones(2, jnp.float32))
    assert mixed.item() in (3.0, 6.0)


@pytest.mark.parametrize(
    ("mask", "leaf"),
    [
        ({"kernel": True}, "'bias'"),
        ({"kernel": True, "bias": True, "scale": False}, "'scale'"),
        ({"kernel": True, "bias": 1.0}, "'bias'"),
        ({"kernel": True, "bias": jnp.ones(2, bool)}, "'bias'"),
        ({"kernel": True, "bias": np.ones(())}, "'bias'"),
        (lambda _: {"bias": True}, "'kernel'"),
        (True, "', bias, kernel'"),
    ],
)
def test_a_mask_that_does_not_fit_names_the_leaf(mask: object, leaf: str) -> None:
    params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    message = "mask must be a tree like the parameters, with one known boolean for each, got leaf="
    with pytest.raises(ValueError, match=f"{message}{leaf}"):
        functional.l2_penalty(params, mask=mask)


@pytest.mark.parametrize("boolean", [bool, np.bool_, np.array, jnp.array])
def test_a_mask_serves_every_form_of_the_parameters(boolean: Callable[[bool], object]) -> None:
    """As an optimizer's masks do: by path, of Python's, NumPy's or JAX's booleans."""
    params = nnx.state(nnx.List([linear.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(11)]))
    pure = nnx.to_pure_dict(params)  # numbers for keys, where text sorts '10' before '2'
    flags = {str(n): {"kernel": boolean(n in (2, 10)), "bias": boolean(False)} for n in range(11)}
    chosen = functional.l2_penalty(*(params[n]["kernel"][...] for n in (2, 10)))
    forms = (flags, {int(n): layer for n, layer in flags.items()}, nnx.State(flags))
    for tree in (params, pure, {str(n): layer for n, layer in pure.items()}):
        for mask in forms:
            assert (
                abs(functional.l2_penalty(tree, mask=mask) - chosen)
                <= 16 * np.finfo(np.float32).eps * chosen
            )
            penalty = jax.jit(lambda t, mask=mask: functional.l2_penalty(t, mask=mask))
            assert abs(penalty(tree) - chosen) <= 16 * np.finfo(np.float32).eps * chosen


def test_an_absent_parameter_needs_no_boolean() -> None:
    params = {"kernel": jnp.ones(2), "bias": None}
    for bias in (None, True):
        assert functional.l2_penalty(params, mask={"kernel": True, "bias": bias}) == 1
    assert functional.l2_penalty(params, mask={"kernel": True}) == 1


def test_a_traced_boolean_is_refused() -> None:
    def penalty(flag: jax.Array) -> jax.Array:
        return functional.l1_penalty({"w": jnp.ones(2)}, mask={"w": flag})

    with pytest.raises(ValueError, match="one known boolean for each, got leaf='w'"):
        jax.jit(penalty)(True)
