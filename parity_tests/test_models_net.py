"""Document 1's ``Net``, initialised three ways, beside ``torch_ref``'s."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop, models, parity
from flaxstab.parity import Budget, HasCdf
from parity_tests.support import random_checks
from parity_tests.support.cases import values
from torch_ref import models as theirs

FORMS = {
    "constructor": (models.NetInConstructor, theirs.NetInConstructor),
    "apply": (models.NetByApply, theirs.NetByApply),
    "modules": (models.NetByModules, theirs.NetByModules),
}
BOUND = math.sqrt(6 / (1 + 2))  # Xavier's of both layers: their fans are 1 and 2
each_form = pytest.mark.parametrize(("ours", "twin"), FORMS.values(), ids=FORMS)


@each_form
def test_a_form_is_its_twin(ours: Callable[..., nnx.Module], twin: Callable[..., object]) -> None:
    torch.manual_seed(0)
    report = parity.compare(ours(rngs=nnx.Rngs(0)), twin(), values(5, 1), dtypes=())
    assert report.passed, str(report)


@each_form
def test_structure_and_biases_are_the_twins(
    ours: Callable[..., nnx.Module], twin: Callable[[], torch.nn.Module]
) -> None:
    found = interop.state_dict(ours(rngs=nnx.Rngs(0)))
    reference = {name: t.numpy() for name, t in twin().state_dict().items()}
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in reference.items()}
    for name in ("layer.0.bias", "fc.bias"):
        np.testing.assert_array_equal(found[name], reference[name])
        np.testing.assert_array_equal(found[name], np.full(found[name].shape, 0.01, np.float32))


def weights(make: Callable[..., nnx.Module], n: int) -> np.ndarray:
    """The weights of n networks, each from a key of its own, as one (n, 4) array."""

    @jax.jit
    @jax.vmap
    def draw(key: jax.Array) -> jax.Array:
        net = make(rngs=nnx.Rngs(key))
        return jnp.concatenate([net.layer.layers[0].kernel[0], net.fc.kernel[:, 0]])

    return np.asarray(draw(jax.random.split(jax.random.key(0), n)))


def law(bound: float) -> HasCdf:
    return HasCdf(lambda x: np.clip((x / bound + 1) / 2, 0, 1), discrepancy=0.02)


@each_form
def test_weights_follow_xaviers_uniform_law(
    ours: Callable[..., nnx.Module], twin: Callable[..., object], budget: Budget
) -> None:
    """A bound that is 5 % off moves the distribution function by 0.024."""
    del twin
    claim = law(BOUND)
    drawn = weights(ours, -(-claim.samples_needed(budget) // 4))
    assert np.abs(drawn).max() <= BOUND
    assert claim.check(drawn.ravel(), budget).passed
    found = np.corrcoef(drawn.T)[np.triu_indices(4, 1)]
    # the four are independent: a correlation of n pairs is within 6 / sqrt(n), but once in 5e8
    assert np.abs(found).max() <= 6 / math.sqrt(len(drawn))


def test_the_law_check_finds_another_bound(budget: Budget) -> None:
    faults = random_checks.for_faults(budget, 2)
    n = law(BOUND).samples_needed(faults)
    drawn = np.random.default_rng(0).uniform(-BOUND, BOUND, n)
    for factor in (0.95, 1.05):
        assert not law(BOUND).check(factor * drawn, faults).passed


def test_the_forms_differ_in_their_draws_and_not_in_their_output() -> None:
    x = jnp.asarray(values(3, 1), jnp.float32)
    nets = [ours(rngs=nnx.Rngs(0)) for ours, _ in FORMS.values()]
    first = nets[0]
    for net in nets[1:]:
        assert not np.array_equal(net.fc.kernel[...], first.fc.kernel[...])
        nnx.update(net, nnx.state(first))
        np.testing.assert_array_equal(net(x), first(x))


@each_form
def test_the_net_is_built_under_jit_and_in_tree_mode(
    ours: Callable[..., nnx.Module], twin: Callable[..., object]
) -> None:
    del twin
    build = functools.partial(ours, param_dtype=jnp.bfloat16)
    plain = nnx.state(build(rngs=nnx.Rngs(0)))
    jitted = nnx.state(nnx.jit(lambda: build(rngs=nnx.Rngs(0)))())
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        tree = nnx.state(build(rngs=nnx.Rngs(0)))
    for a, b, c in zip(*map(jax.tree.leaves, (plain, jitted, tree)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
