"""Losses and the exact GELU against PyTorch and closed forms."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

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


class Case(NamedTuple):
    """Labels, class weights and options of one loss of the same logits."""

    labels: np.ndarray
    weight: np.ndarray | None = None
    options: Mapping[str, object] = MappingProxyType({})


def _torch(case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's loss of features-last logits."""
    weight = None if case.weight is None else torch.tensor(case.weight)
    labels = torch.tensor(case.labels)
    labels = labels.movedim(-1, 1) if labels.is_floating_point() else labels.long()
    return lambda x: F.cross_entropy(x.movedim(-1, 1), labels, weight, **case.options)


def _ours(case: Case) -> Callable[[jax.Array], jax.Array]:
    return lambda x: functional.cross_entropy(
        x, jnp.asarray(case.labels), weight=case.weight, **case.options
    )


WEIGHTS = {"plain": None, "weighted": WEIGHT}
SMOOTHINGS = (0.0, 0.1, 1.0)
REDUCTIONS = ("mean", "sum", "none")
GRID = {
    **{
        f"classes, {kind}, ignoring {ignored}, smoothed by {smoothing}, {reduction}": Case(
            LABELS,
            weight,
            {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": reduction},
        )
        for (kind, weight), ignored, smoothing, reduction in itertools.product(
            WEIGHTS.items(), (-100, IGNORED), SMOOTHINGS, REDUCTIONS
        )
    },
    **{
        f"probabilities, {kind}, smoothed by {smoothing}, {reduction}": Case(
            SOFT, weight, {"label_smoothing": smoothing, "reduction": reduction}
        )
        for (kind, weight), smoothing, reduction in itertools.product(
            WEIGHTS.items(), SMOOTHINGS, REDUCTIONS
        )
    },
    **{
        f"all ignored, smoothed by {smoothing}, {reduction}": Case(
            np.full((4, 3), -100), WEIGHT, {"label_smoothing": smoothing, "reduction": reduction}
        )
        for smoothing, reduction in itertools.product((0.0, 0.1), REDUCTIONS)
    },
    "one class without weight": Case(LABELS, WEIGHT * (np.arange(CLASSES) != 1)),
    "labels of one byte": Case(LABELS.astype("uint8"), WEIGHT),
    "defaults": Case(np.where(LABELS == IGNORED, -100, LABELS)),
}


def _cotangent(case: Case) -> np.ndarray:
    return values(*((4, 3) if case.options.get("reduction") == "none" else ()), seed=1)


@functools.cache
def _found() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Our loss and gradient in every case, in one program."""

    def both(x: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = {}
        for name, case in GRID.items():
            loss, pullback = jax.vjp(_ours(case), x)
            found[name] = loss, *pullback(jnp.asarray(_cotangent(case)))
        return found

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return jax.tree.map(np.asarray, jax.jit(both)(LOGITS))


@pytest.mark.parametrize("name", GRID)
def test_cross_entropy_and_its_gradient_are_torchs(name: str) -> None:
    loss, gradient = _found()[name]
    x = torch.tensor(LOGITS, requires_grad=True)
    expected = _torch(GRID[name])(x)
    cotangent = _cotangent(GRID[name])
    (theirs,) = torch.autograd.grad(expected, x, torch.tensor(cotangent))
    assert_same(loss, expected)
    assert_same(gradient, theirs, np.abs(cotangent).max())


def test_the_mean_of_none_is_nan_and_the_sum_0() -> None:
    ignored = {name: _found()[name] for name in GRID if name.startswith("all ignored")}
    assert len(ignored) == 6
    for name, (loss, gradient) in ignored.items():
        np.testing.assert_array_equal(loss, np.nan if "mean" in name else 0)
        assert not name.endswith(("sum", "none")) or not gradient.any()


def test_ignored_samples_have_no_gradient() -> None:
    _, gradient = _found()[f"classes, plain, ignoring {IGNORED}, smoothed by 0.1, mean"]
    np.testing.assert_array_equal((gradient == 0).all(-1), LABELS == IGNORED)


def test_cross_entropy_defaults_are_torchs() -> None:
    _, gradient = _found()["defaults"]
    np.testing.assert_array_equal((gradient == 0).all(-1), LABELS == IGNORED)


@pytest.mark.parametrize("axes", [(), (2, 3, 2)], ids=["one sample", "a volume"])
def test_cross_entropy_takes_any_number_of_axes(axes: tuple[int, ...]) -> None:
    logits = values(*axes, CLASSES)
    labels = np.random.default_rng(4).integers(0, CLASSES, axes)
    soft = np.random.default_rng(5).dirichlet(np.ones(CLASSES), axes)
    moved = torch.tensor(logits).movedim(-1, min(1, len(axes)))
    with jax.enable_x64(True):
        found = functional.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
        assert_same(found, F.cross_entropy(moved, torch.tensor(labels)))
        found = functional.cross_entropy(jnp.asarray(logits), jnp.asarray(soft))
        target = torch.tensor(soft).movedim(-1, min(1, len(axes)))
        assert_same(found, F.cross_entropy(moved, target))


@pytest.mark.parametrize("labels", [np.zeros(0, int), np.zeros((0, CLASSES))])
def test_the_mean_of_no_samples_is_nan_and_the_sum_0(labels: np.ndarray) -> None:
    for reduction in ("mean", "sum"):
        with jax.enable_x64(True):
            found = functional.cross_entropy(
                jnp.zeros((0, CLASSES)), jnp.asarray(labels), reduction=reduction
            )
        target = torch.tensor(labels)
        theirs = F.cross_entropy(torch.zeros(0, CLASSES).double(), target, reduction=reduction)
        assert_same(found, theirs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_impossible_class_counts_as_in_torch(label_smoothing: float) -> None:
    """A logit of minus infinity: finite without smoothing, infinite with it."""
    logits = LOGITS[0].copy()
    logits[:, 4] = -np.inf
    labels = np.array([0, 1, 2])
    case = Case(labels, None, {"label_smoothing": label_smoothing})
    with jax.enable_x64(True):
        found = _ours(case)(jnp.asarray(logits))
    assert_same(found, _torch(case)(torch.tensor(logits)))
    assert bool(np.isfinite(found)) is (label_smoothing == 0)


@pytest.mark.parametrize("label", [-1, CLASSES, 100])
def test_a_known_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(
        ValueError, match=r"labels must lie in \[0, classes\) or equal ignore_index"
    ):
        functional.cross_entropy(jnp.zeros((1, CLASSES)), jnp.array([label]))


@pytest.mark.parametrize("label", [-1, CLASSES, 100])
def test_a_traced_label_out_of_range_gives_nan_for_its_sample(label: int) -> None:
    def losses(x: jax.Array, labels: jax.Array) -> jax.Array:
        return functional.cross_entropy(x, labels, reduction="none")

    found, pullback = jax.vjp(
        lambda x: jax.jit(losses)(x, jnp.array([0, label])), jnp.zeros((2, CLASSES))
    )
    (gradient,) = pullback(jnp.ones(2))  # so that what guards against NaN sees it, too
    np.testing.assert_array_equal(np.isnan(found), [False, True])
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), [False, True])
    assert np.isfinite(gradient[0]).all()


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
        ({"labels": jnp.array([True, False])}, "labels must be integers or class probabilities, "),
        ({"ignore_index": 0.5}, "ignore_index must be an integer, got ignore_index=0.5"),
        (
            {"labels": jnp.ones((2, CLASSES)), "ignore_index": 1},
            "ignore_index must be below 0 with class probabilities, .* got ignore_index=1",
        ),
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
    ours = _ours(Case(narrow, weight, {"label_smoothing": 0.1}))
    report = compare(ours, theirs, LOGITS, dtypes=(np.float32, jnp.bfloat16))
    assert report.passed, str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_keeps_the_dtype(dtype: str) -> None:
    assert functional.cross_entropy(jnp.zeros((2, 3), dtype), jnp.array([0, 1])).dtype == dtype


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


@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["classes", "probabilities"])
def test_the_smoothing_may_be_traced(labels: np.ndarray) -> None:
    def smoothed(x: jax.Array, smoothing: jax.Array) -> jax.Array:
        return _ours(Case(labels, WEIGHT, {"label_smoothing": smoothing}))(x)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = jax.jit(smoothed)(LOGITS, jnp.float32(0.25))
    expected = _torch(Case(labels, WEIGHT, {"label_smoothing": 0.25}))(torch.tensor(LOGITS))
    assert_same(found, expected)


def test_a_traced_smoothing_of_0_ignores_an_impossible_class() -> None:
    logits = jnp.zeros((2, CLASSES)).at[:, 4].set(-jnp.inf)

    def smoothed(smoothing: jax.Array) -> jax.Array:
        labels = jnp.array([0, 1])
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    assert abs(jax.jit(smoothed)(0.0) - math.log(4)) <= 4 * np.finfo(np.float32).eps


NARROW = {
    "uint8": (200, [1, 156, 199]),  # 156 is -100 in 8 bits
    "int8": (200, [1, 127, -100]),
    "uint16": (65600, [1, 65436, 65535]),  # 65436 is -100 in 16 bits
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_of_a_narrow_dtype_count_as_in_torch(
    dtype: str, kind: Callable[[np.ndarray], jax.Array], label_smoothing: float
) -> None:
    """Known, known under ``jit`` and traced."""
    classes, numbers = NARROW[dtype]
    logits, labels = values(3, classes), kind(np.array(numbers, dtype))
    assert labels.dtype == dtype
    loss = functools.partial(functional.cross_entropy, label_smoothing=label_smoothing)
    theirs = F.cross_entropy(
        torch.tensor(logits), torch.tensor(numbers), label_smoothing=label_smoothing
    )
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = jnp.asarray(logits)
        for found in (
            loss(x, labels),
            jax.jit(loss)(x, labels),
            jax.jit(lambda: loss(x, labels))(),
        ):
            assert_same(found, theirs)


def test_256_classes_fit_labels_of_one_byte() -> None:
    logits, labels = jnp.asarray(values(2, 256), jnp.float32), jnp.array([0, 255], jnp.uint8)
    expected = functional.cross_entropy(logits, jnp.asarray(labels, jnp.int32))
    assert functional.cross_entropy(logits, labels) == expected
    assert jnp.isfinite(jax.jit(functional.cross_entropy)(logits, labels))


@pytest.mark.parametrize(
    ("dtype", "label"), [("uint32", 2**32 - 100), ("uint32", 2**31), ("int32", 2**31 - 1)]
)
def test_a_wide_label_out_of_range_does_not_wrap(dtype: str, label: int) -> None:
    logits, labels = jnp.zeros((1, CLASSES)), jnp.array([label], dtype)
    assert jnp.isnan(jax.jit(functional.cross_entropy)(logits, labels))
    with pytest.raises(ValueError, match="labels must lie in"):
        functional.cross_entropy(logits, labels)


def test_known_arrays_may_be_options_in_a_jitted_function() -> None:
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS, jnp.int32)
    options = {"label_smoothing": jnp.float32(0.25), "ignore_index": jnp.int32(IGNORED)}
    loss = jax.jit(lambda x: functional.cross_entropy(x, labels, **options))(logits)
    plain = {"label_smoothing": 0.25, "ignore_index": IGNORED}
    assert loss == jax.jit(lambda x: functional.cross_entropy(x, labels, **plain))(logits)
    soft = jnp.asarray(SOFT, jnp.float32)
    options["ignore_index"] = jnp.int32(-1)
    assert jnp.isfinite(jax.jit(lambda x: functional.cross_entropy(x, soft, **options))(logits))
    options["label_smoothing"] = jnp.float32(1.5)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\]"):
        jax.jit(lambda x: functional.cross_entropy(x, soft, **options))(logits)


def test_a_traced_ignore_index_is_compared_in_a_dtype_that_holds_it() -> None:
    logits, labels = jnp.asarray(values(2, 200), jnp.float32), jnp.array([1, 156], jnp.uint8)
    found = jax.jit(functional.cross_entropy)(logits, labels, ignore_index=-100)
    assert found == jax.jit(functional.cross_entropy)(logits, labels)
