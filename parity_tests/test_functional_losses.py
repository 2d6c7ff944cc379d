"""Losses, penalties and the exact GELU against PyTorch and closed forms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from flaxstab import functional
from flaxstab.parity import compare
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, assert_twins

CLASSES = 5
LOGITS = values(4, 3, CLASSES)
WEIGHT = np.abs(values(CLASSES, seed=1))
IGNORED = 2
LABELS = np.random.default_rng(2).integers(0, CLASSES, (4, 3))
LABELS[0, 0], LABELS[3, 2] = IGNORED, IGNORED
SOFT = np.random.default_rng(3).dirichlet(np.ones(CLASSES), (4, 3))


def _torch(
    labels: np.ndarray, weight: np.ndarray | None, *, classes_axis: int = 1, **options: object
) -> object:
    """PyTorch's loss of features-last logits."""
    weight = None if weight is None else torch.tensor(weight)
    labels = torch.tensor(labels)
    if labels.is_floating_point():
        labels = labels.movedim(-1, classes_axis)
    return lambda x: F.cross_entropy(x.movedim(-1, 1), labels, weight, **options)


def _ours(labels: np.ndarray, weight: np.ndarray | None, **options: object) -> object:
    return lambda x: functional.cross_entropy(x, jnp.asarray(labels), weight=weight, **options)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, IGNORED])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_classes_is_torchs(
    weight: np.ndarray | None, ignore_index: int, label_smoothing: float, reduction: str
) -> None:
    options = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction,
    }  # fmt: skip
    assert_twins(_ours(LABELS, weight, **options), _torch(LABELS, weight, **options), LOGITS)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_probabilities_is_torchs(
    weight: np.ndarray | None, label_smoothing: float, reduction: str
) -> None:
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    assert_twins(_ours(SOFT, weight, **options), _torch(SOFT, weight, **options), LOGITS)


def test_cross_entropy_defaults_are_torchs() -> None:
    labels = np.array([1, -100, 3])
    assert_twins(_ours(labels, None), _torch(labels, None), LOGITS[0])


def test_cross_entropy_takes_plain_and_single_batches() -> None:
    with jax.enable_x64(True):
        found = functional.cross_entropy(jnp.asarray(LOGITS[0, 0]), jnp.asarray(3))
        assert_same(found, F.cross_entropy(torch.tensor(LOGITS[0, 0]), torch.tensor(3)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("reduction", "expected"), [("mean", np.nan), ("sum", 0.0)])
def test_all_labels_ignored_give_torchs_result(
    label_smoothing: float, reduction: str, expected: object
) -> None:
    labels = np.full((4, 3), -100)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    with jax.enable_x64(True):
        found = _ours(labels, WEIGHT, **options)(jnp.asarray(LOGITS))
        assert_same(found, _torch(labels, WEIGHT, **options)(torch.tensor(LOGITS)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_impossible_class_counts_as_in_torch(label_smoothing: float) -> None:
    """A logit of minus infinity: finite without smoothing, infinite with it."""
    logits = LOGITS[0].copy()
    logits[:, 4] = -np.inf
    labels = np.array([0, 1, 2])
    with jax.enable_x64(True):
        found = _ours(labels, None, label_smoothing=label_smoothing)(jnp.asarray(logits))
    theirs = _torch(labels, None, label_smoothing=label_smoothing)(torch.tensor(logits))
    assert_same(found, theirs)
    assert bool(np.isfinite(found)) is (label_smoothing == 0)


def test_ignored_samples_have_no_gradient() -> None:
    with jax.enable_x64(True):
        loss = _ours(LABELS, None, ignore_index=IGNORED, label_smoothing=0.1)
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))
    np.testing.assert_array_equal((gradient == 0).all(-1), LABELS == IGNORED)


@pytest.mark.parametrize("label", [-1, CLASSES, 100])
def test_a_known_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(
        ValueError, match=r"labels must lie in \[0, classes\) or equal ignore_index"
    ):
        functional.cross_entropy(jnp.zeros((1, CLASSES)), jnp.array([label]))


@pytest.mark.parametrize("label", [-1, CLASSES, 100])
def test_a_traced_label_out_of_range_gives_nan_for_its_sample(label: int) -> None:
    losses = jax.jit(lambda x, y: functional.cross_entropy(x, y, reduction="none"))(
        jnp.zeros((2, CLASSES)), jnp.array([0, label])
    )
    np.testing.assert_array_equal(np.isnan(losses), [False, True])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_smoothing": 1.5},
            r"label_smoothing must lie in \[0, 1\], got label_smoothing=1.5",
        ),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\]"),
        ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none', got reduction='max'"),
        (
            {"weight": jnp.ones(3)},
            r"weight must hold one factor per class, got weight_shape=\(3,\)",
        ),
        ({"labels": jnp.array([0])}, "integer labels must have the logits' shape without its last"),
        ({"labels": jnp.ones((2, 3))}, "class probabilities must have the logits' shape"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    given = {"labels": jnp.array([0, 1]), **options}
    with pytest.raises(ValueError, match=message):
        functional.cross_entropy(jnp.zeros((2, CLASSES)), **given)


@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["classes", "probabilities"])
def test_cross_entropy_is_as_precise_as_torchs(labels: np.ndarray) -> None:
    weight = WEIGHT.astype("float32")

    def theirs(x: jax.Array) -> object:
        target = torch.tensor(labels)
        if target.is_floating_point():
            target = target.movedim(-1, 1).to(x.dtype)
        factors = torch.tensor(weight).to(x.dtype)
        return F.cross_entropy(x.movedim(-1, 1), target, factors, label_smoothing=0.1)

    narrow = labels if labels is SOFT else labels.astype("int32")  # x64 comes and goes here
    ours = _ours(narrow, weight, label_smoothing=0.1)
    report = compare(ours, theirs, LOGITS, dtypes=(np.float32, jnp.bfloat16))
    assert report.passed, str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_keeps_the_dtype(dtype: str) -> None:
    assert functional.cross_entropy(jnp.zeros((2, 3), dtype), jnp.array([0, 1])).dtype == dtype


def test_the_penalties_are_sums_of_absolute_values_and_half_squares() -> None:
    a, b = values(3, 4), values(5, seed=1)
    with jax.enable_x64(True):
        assert_same(functional.l1_penalty(a, b), np.abs(a).sum() + np.abs(b).sum())
        assert_same(functional.l2_penalty(a, b), (np.square(a).sum() + np.square(b).sum()) / 2)


def test_the_gradient_of_the_l2_penalty_is_torchs_weight_decay() -> None:
    parameter = torch.nn.Parameter(torch.tensor(values(4)))
    parameter.grad = torch.zeros_like(parameter)
    before = parameter.detach().numpy().copy()
    torch.optim.SGD([parameter], lr=1.0, weight_decay=0.01).step()
    with jax.enable_x64(True):
        decay = jax.grad(lambda p: 0.01 * functional.l2_penalty(p))(jnp.asarray(before))
        assert_same(before - decay, parameter.detach())


@pytest.mark.parametrize("penalty", [functional.l1_penalty, functional.l2_penalty])
def test_penalties_run_in_float32_or_wider(penalty: Callable[..., object]) -> None:
    """1024 ones in bfloat16 arithmetic stay 256."""
    assert penalty(jnp.ones(1024, jnp.bfloat16)).dtype == jnp.float32
    assert penalty(jnp.ones(1024, jnp.bfloat16)).item() in (512.0, 1024.0)
    assert penalty().item() == 0.0


@pytest.mark.parametrize("penalty", [functional.l1_penalty, functional.l2_penalty])
def test_penalties_add_parameters_of_different_dtypes(penalty: Callable[..., object]) -> None:
    with jax.numpy_dtype_promotion("strict"):
        mixed = penalty(jnp.ones(4, jnp.bfloat16), jnp.ones(2, jnp.float32))
    assert mixed.item() in (3.0, 6.0)


def test_gelu_is_torchs_exact_one() -> None:
    assert_twins(functional.gelu, F.gelu, np.linspace(-6, 6, 101))


def test_gelu_is_not_the_tanh_approximation() -> None:
    """The distances that the docstring states."""
    x = np.linspace(-5, 5, 10_001)
    with jax.enable_x64(True):
        value = np.abs(functional.gelu(x) - jax.nn.gelu(x, approximate=True)).max()
        exact, tanh = (
            jax.vmap(jax.grad(f))(x)
            for f in (functional.gelu, lambda x: jax.nn.gelu(x, approximate=True))
        )
    assert f"{value:.1e}" == "4.7e-04"
    assert f"{np.abs(exact - tanh).max():.1e}" == "8.7e-04"


def test_gelu_is_as_precise_as_torchs() -> None:
    report = compare(
        functional.gelu, F.gelu, np.linspace(-6, 6, 101), dtypes=(np.float32, jnp.bfloat16)
    )
    assert report.passed, str(report)


def test_known_labels_may_stand_in_a_jitted_function() -> None:
    logits, labels = jnp.asarray(values(4, 3)), jnp.array([0, 2, -100, 1])
    loss = jax.jit(lambda x: functional.cross_entropy(x, labels))(logits)
    expected = jax.jit(functional.cross_entropy)(logits, labels)
    assert abs(loss - expected) <= 4 * jnp.finfo(jnp.float32).eps * expected  # of four terms
    beyond = labels + 1
    with pytest.raises(ValueError, match="labels must lie in"):
        jax.jit(lambda x: functional.cross_entropy(x, beyond))(logits)
