"""``RMSNorm`` and ``FrozenBatchNorm`` against PyTorch, and what never changes when frozen."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F  # noqa: N812

from flaxstab import interop, norms
from flaxstab.parity import compare
from parity_tests.support.cases import values
from parity_tests.support.layers import OFFSET_ERROR, assert_same, assert_twins, image
from torch_ref import norms as torch_norms

C = 4
PLAIN = (np.float32, jnp.bfloat16)


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """Gives parameters and buffers values that no default hides."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (C, {}),
        ((C,), {"elementwise_affine": False}),
        ((3, C), {"eps": 1e-3}),
        ((5, 3, C), {"eps": 0.0}),
    ],
    ids=str,
)
def test_rms_norm_is_torchs(shape: tuple[int, ...], options: dict[str, object]) -> None:
    ours, theirs = norms.RMSNorm(shape, **options), torch.nn.RMSNorm(shape, **options)
    report = compare(ours, drawn(theirs), values(2, 5, 3, C))
    assert report.passed, str(report)


def test_another_eps_by_default_is_seen() -> None:
    """Even float32's in a float64 run; Flax's is 1e-6."""
    report = compare(norms.RMSNorm(C, 1.2e-7), torch.nn.RMSNorm(C), values(5, C))
    assert not report.passed


def test_rms_norm_is_as_precise_as_torchs() -> None:
    ours, theirs = norms.RMSNorm(64), drawn(torch.nn.RMSNorm(64))
    report = compare(ours, theirs, values(16, 64), dtypes=PLAIN)
    assert report.passed, str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_default_eps_of_rms_norm_is_torchs_where_it_shows(dtype: str) -> None:
    """Squares of 1e-8, or 1e-16 in float64: eps decides the result."""
    size = 1e-8 if dtype == "float64" else 1e-4
    x = size * values(3, C, offset=0.0, scale=1.0)
    with jax.enable_x64(dtype == "float64"):
        y = norms.RMSNorm(C)(jnp.asarray(x, dtype))
    kind = vars(torch)[dtype]
    theirs = torch.nn.RMSNorm(C, dtype=kind)(torch.tensor(x, dtype=kind)).detach()
    error = np.abs(np.asarray(y, np.float64) - theirs.double().numpy()).max()
    # Each side rounds its result and a few values before it.
    assert error <= 4 * float(jnp.finfo(dtype).eps) * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: norms.RMSNorm(()), "normalized_shape must name at least one axis"),
        (lambda: norms.RMSNorm((3, 0)), "normalized_shape must be an integer of at least 1"),
        (lambda: norms.RMSNorm(C, -1.0), "eps must be a number of at least 0, got eps=-1.0"),
        (lambda: norms.RMSNorm(C, dtype=int), "dtype must be a floating-point dtype"),
        (lambda: norms.RMSNorm(C)(jnp.ones((2, 3))), "last axes must be normalized_shape"),
        (lambda: norms.FrozenBatchNorm(0), "num_features must be an integer of at least 1"),
        (
            lambda: norms.FrozenBatchNorm(C, -1.0),
            "eps must be a number of at least 0, got eps=-1.0",
        ),
        (lambda: norms.FrozenBatchNorm(C, param_dtype=int), "param_dtype must be a floating"),
        (
            lambda: norms.FrozenBatchNorm(C)(jnp.ones((2, 3))),
            "last axis must have num_features elements",
        ),
    ],
)
def test_wrong_arguments_are_refused(build: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_rms_norm_has_torchs_arguments_and_no_bias() -> None:
    assert set(vars(norms.RMSNorm(C))) & {"bias", "scale"} == {"scale"}
    assert norms.RMSNorm([3, C], elementwise_affine=False).normalized_shape == (3, C)
    assert norms.RMSNorm(C, elementwise_affine=False).scale is None


def loaded(eps: float = 1e-5) -> tuple[norms.FrozenBatchNorm, dict[str, torch.Tensor]]:
    """A frozen layer in float64 with the tensors of torchvision's, also one that it drops."""
    tensors = {n: t.double() for n, t in drawn(torch_norms.FrozenBatchNorm(C)).named_buffers()}
    ours = norms.FrozenBatchNorm(C, eps, param_dtype=jnp.float64)
    interop.load_state_dict(ours, tensors | {"num_batches_tracked": torch.tensor(7)})
    return ours, tensors


@pytest.mark.parametrize("shape", [(5, C), (5, 7, C), (5, 3, 2, C), (1, 1, C)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_a_frozen_layer_is_torchs_evaluation(shape: tuple[int, ...], eps: float) -> None:
    with jax.enable_x64(True):
        ours, t = loaded(eps)

        def theirs(x: torch.Tensor) -> torch.Tensor:
            statistics = t["running_mean"], t["running_var"], t["weight"], t["bias"]
            return F.batch_norm(x, *statistics, training=False, eps=eps)

        assert_twins(ours, image(theirs), values(*shape))


class TorchFrozen(torch_norms.FrozenBatchNorm):
    """By torch's own function, which keeps the input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *statistics, training=False, eps=self.eps)


def test_a_frozen_layer_is_as_precise_as_torchs() -> None:
    theirs = drawn(TorchFrozen(C))
    report = compare(
        norms.FrozenBatchNorm(C), theirs, values(6, 4, 4, C), layout="image", dtypes=PLAIN
    )
    assert report.passed, str(report)


def test_a_frozen_layer_takes_what_torchvision_saves_and_gives_it_back() -> None:
    with jax.enable_x64(True):
        ours, tensors = loaded()
        saved = interop.state_dict(ours)
    assert list(saved) == ["weight", "bias", "running_mean", "running_var"]
    for name, tensor in tensors.items():
        assert_same(saved[name], tensor)


def test_an_offset_costs_a_frozen_layer_no_digits() -> None:
    """Folding scale and shift into one product and one sum, as torchvision does, fails this."""
    x = np.float32(values(64, C, offset=1e4, scale=1.0))
    mean, var = np.float32(x.mean(0)), np.float32(x.var(0))
    layer = norms.FrozenBatchNorm(C)
    layer.mean[...], layer.var[...] = jnp.asarray(mean), jnp.asarray(var)
    expected = (x.astype(float) - mean) / np.sqrt(var.astype(float) + 1e-5)
    assert np.abs(np.asarray(layer(jnp.asarray(x)), float) - expected).max() <= OFFSET_ERROR
    factor = np.float32(1 / np.sqrt(var + np.float32(1e-5)))
    folded = x * factor - mean * factor
    assert np.abs(folded - expected).max() > OFFSET_ERROR


def test_a_frozen_layer_has_statistics_alone_and_keeps_them() -> None:
    layer = norms.FrozenBatchNorm(C)
    held = nnx.state(layer, nnx.BatchStat)
    assert set(held) == {"scale", "bias", "mean", "var"}
    assert not nnx.state(layer, nnx.Param)
    before = {name: np.asarray(variable[...]) for name, variable in held.items()}
    x = jnp.asarray(values(5, C), jnp.float32)
    expected = layer(x)
    layer.train()
    for y in (
        layer(x),
        layer(x, use_running_average=False, mask=x > 0),
        nnx.view(layer, use_running_average=False)(x),
    ):
        np.testing.assert_array_equal(y, expected)
    layer.eval()
    np.testing.assert_array_equal(layer(x), expected)
    for name, variable in nnx.state(layer).items():
        np.testing.assert_array_equal(variable[...], before[name])


def test_gradients_reach_the_input_of_a_frozen_layer_and_nothing_else() -> None:
    graph, state = nnx.split(norms.FrozenBatchNorm(C))
    x = jnp.asarray(values(5, C), jnp.float32)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state, copy=True)(x) ** 2)

    variables, inputs = jax.grad(loss, (0, 1))(state, x)
    assert np.asarray(inputs).all()
    assert len(jax.tree.leaves(variables)) == 4
    assert not any(leaf.any() for leaf in jax.tree.leaves(variables))
