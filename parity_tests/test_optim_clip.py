"""``flaxstab.optim.clip_grad_norm`` against ``torch.nn.utils.clip_grad_norm_``."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flaxstab import optim
from flaxstab.parity._verdict import judge_numerics, judge_semantics
from parity_tests.support.cases import values

SHAPES = {"kernel": (5, 4), "bias": (4,), "gain": ()}
NORMS = [1.0, 2.0, 3.0, 0.5, math.inf]
ODD_NORMS = [0.0, -1.0, -math.inf]
Tree = dict[str, np.ndarray]


def gradients(total: float, order: float = 2.0) -> Tree:
    """Gradients of the given total norm, of both signs."""
    raw = {n: values(*s, seed=i, offset=0.5) for i, (n, s) in enumerate(SHAPES.items())}
    flat = np.concatenate([leaf.ravel() for leaf in raw.values()])
    size = np.linalg.norm(flat, order) if order > 0 else 1.0
    return {name: leaf * (total / size) for name, leaf in raw.items()}


def theirs(tree: Tree, dtype: str, max_norm: float, **options: object) -> tuple[Tree, np.ndarray]:
    kind = getattr(torch, dtype)
    params = {name: torch.zeros(leaf.shape, dtype=kind) for name, leaf in tree.items()}
    for name, leaf in tree.items():
        params[name].grad = torch.tensor(leaf).to(kind)
    norm = torch.nn.utils.clip_grad_norm_(list(params.values()), max_norm, **options)
    return {name: p.grad.numpy() for name, p in params.items()}, norm.numpy()


def ours(
    tree: Tree, dtype: str, max_norm: float, **options: object
) -> tuple[Tree, optim.ClipState]:
    given = {name: jnp.asarray(leaf, dtype) for name, leaf in tree.items()}
    tx = optim.clip_grad_norm(max_norm, **options)
    clipped, state = tx.update(given, tx.init(given))
    return {name: np.asarray(leaf) for name, leaf in clipped.items()}, state


def assert_same(found: tuple[Tree, optim.ClipState], expected: tuple[Tree, np.ndarray]) -> None:
    (clipped, state), (reference, norm) = found, expected
    pairs = [(name, clipped[name], reference[name]) for name in reference]
    for name, mine, torchs in [*pairs, ("norm", np.asarray(state.norm), norm)]:
        assert mine.dtype == torchs.dtype
        finite = np.abs(torchs[np.isfinite(torchs)])
        finding = judge_semantics(name, mine, torchs, float(np.max(finite, initial=0)))
        assert finding.passed, finding.explanation


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize("total", [18.0, 1.0, 0.3, 1.8e-3, 2e-8, 0.0])
@pytest.mark.parametrize("max_norm", [1.0, 1e-8, 0.0])
def test_clipping_is_torchs_in_float64(order: float, total: float, max_norm: float) -> None:
    tree = gradients(total, order)
    with jax.enable_x64(True):
        found = ours(tree, "float64", max_norm, norm_type=order)
        assert_same(found, theirs(tree, "float64", max_norm, norm_type=order))


@pytest.mark.parametrize("order", ODD_NORMS)
def test_any_order_is_torchs(order: float) -> None:
    tree = gradients(18.0, order)
    with jax.enable_x64(True):
        assert_same(
            ours(tree, "float64", 1.0, norm_type=order),
            theirs(tree, "float64", 1.0, norm_type=order),
        )


def test_absent_gradients_neither_count_nor_change() -> None:
    tree = {**gradients(18.0), "absent": None}
    params = {name: torch.zeros(SHAPES.get(name, (3,))).double() for name in tree}
    for name, leaf in tree.items():
        params[name].grad = None if leaf is None else torch.tensor(leaf)
    norm = torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
    with jax.enable_x64(True):
        tx = optim.clip_grad_norm(1.0)
        clipped, state = tx.update(jax.tree.map(jnp.asarray, tree), tx.init(tree))
        assert clipped.pop("absent") is None
        expected = {name: params[name].grad.numpy() for name in SHAPES}
        assert_same((jax.tree.map(np.asarray, clipped), state), (expected, norm.numpy()))


def test_the_default_is_the_2_norm() -> None:
    tree = gradients(18.0)
    with jax.enable_x64(True):
        assert_same(ours(tree, "float64", 1.0), theirs(tree, "float64", 1.0))


def test_optax_differs_for_small_norms_and_the_comparison_finds_it() -> None:
    tree = gradients(1.8e-3)
    with jax.enable_x64(True):
        expected = theirs(tree, "float64", 1e-4)
        clipped, _ = optax.clip_by_global_norm(1e-4).update(tree, optax.EmptyState())
        state = optim.ClipState(jnp.asarray(expected[1]), jnp.asarray(False))
        with pytest.raises(AssertionError, match="differ by"):
            assert_same(({n: np.asarray(a) for n, a in clipped.items()}, state), expected)


@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize("total", [18.0, 1.8e-3, 2e-8])
def test_clipping_in_float32_is_as_accurate_as_torchs(order: float, total: float) -> None:
    rounded = {n: np.asarray(a, np.float32) for n, a in gradients(total, order).items()}
    exact, exact_norm = theirs(rounded, "float64", 1e-8, norm_type=order)
    torchs, torchs_norm = theirs(rounded, "float32", 1e-8, norm_type=order)
    mine, state = ours(rounded, "float32", 1e-8, norm_type=order)
    rows = [(n, mine[n], torchs[n], exact[n]) for n in exact]
    for name, a, b, oracle in [*rows, ("norm", np.asarray(state.norm), torchs_norm, exact_norm)]:
        assert a.dtype == np.float32
        size = float(np.max(np.abs(oracle)))
        finding = judge_numerics(name, a, b, (oracle, oracle), size, np.float32)
        assert finding.passed, finding.explanation


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", NORMS)
def test_nan_and_infinity_spread_as_in_torch_and_are_reported(bad: float, order: float) -> None:
    tree = gradients(3.0)
    tree["kernel"][1, 2] = bad
    with jax.enable_x64(True):
        found = ours(tree, "float64", 1.0, norm_type=order)
        assert_same(found, theirs(tree, "float64", 1.0, norm_type=order))
        assert bool(found[1].nonfinite)
        assert not bool(ours(gradients(3.0), "float64", 1.0)[1].nonfinite)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite_raises_eagerly_as_torch_does(bad: float) -> None:
    tree = gradients(3.0)
    tree["bias"][0] = bad
    with pytest.raises(RuntimeError, match="non-finite"):
        theirs(tree, "float32", 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match=f"total norm must be finite, got norm={bad}"):
        ours(tree, "float32", 1.0, error_if_nonfinite=True)
    clipped, _ = ours(gradients(3.0), "float32", 1.0, error_if_nonfinite=True)
    assert np.isfinite(clipped["kernel"]).all()


def test_under_jit_a_nonfinite_norm_is_only_reported() -> None:
    tree = {"w": jnp.array([1.0, jnp.nan])}
    tx = optim.clip_grad_norm(1.0, error_if_nonfinite=True)
    _, state = jax.jit(tx.update)(tree, tx.init(tree))
    assert bool(state.nonfinite)


def test_float16_gradients_of_norm_500_are_clipped_and_not_lost() -> None:
    tree = {"w": np.array([300.0, 400.0])}
    clipped, state = ours(tree, "float16", 1.0)
    assert state.norm.dtype == jnp.float32
    assert float(state.norm) == 500.0
    assert clipped["w"].dtype == np.float16
    exact = tree["w"] / (500 + 1e-6)
    assert clipped["w"].tolist() == exact.astype(np.float16).tolist()
    # torch rounds the factor to float16 as well.
    torchs, _ = theirs(tree, "float16", 1.0)
    assert np.max(np.abs(torchs["w"] - exact)) >= np.max(np.abs(clipped["w"] - exact))
    lost, _ = optax.clip_by_global_norm(1.0).update(
        {"w": jnp.asarray(tree["w"], "float16")}, optax.EmptyState()
    )
    assert not lost["w"].any()


def test_bfloat16_gradients_have_a_float32_norm() -> None:
    tree = {"w": jnp.full((512,), 0.03125, jnp.bfloat16)}  # 512 * 2**-10 = 0.5, exact
    tx = optim.clip_grad_norm(1.0)
    clipped, state = tx.update(tree, tx.init(tree))
    eps = float(jnp.finfo(jnp.float32).eps)
    assert abs(float(state.norm) - math.sqrt(0.5)) <= eps
    assert clipped["w"].tolist() == tree["w"].tolist()


def test_no_gradients_have_norm_zero() -> None:
    tx = optim.clip_grad_norm(1.0)
    clipped, state = tx.update({}, tx.init({}))
    assert clipped == {}
    assert float(state.norm) == 0.0
    empty = {"w": jnp.zeros((0, 3))}
    for order in NORMS:
        tx = optim.clip_grad_norm(1.0, order)
        assert float(tx.update(empty, tx.init(empty))[1].norm) == 0.0


def test_the_norm_spans_leaves_of_different_dtypes() -> None:
    tree = {"low": jnp.array([3.0], jnp.float16), "wide": jnp.array([4.0], jnp.float32)}
    tx = optim.clip_grad_norm(1.0)
    clipped, state = tx.update(tree, tx.init(tree))
    assert float(state.norm) == 5.0
    assert {name: leaf.dtype.name for name, leaf in clipped.items()} == {
        "low": "float16",
        "wide": "float32",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "max_norm must be at least 0, got max_norm=-1.0"),
        ((math.nan,), "max_norm must be at least 0, got max_norm=nan"),
        ((1.0, math.nan), "norm_type must be a number, got norm_type=nan"),
    ],
)
def test_clipping_names_bad_arguments(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.clip_grad_norm(*arguments)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("value", [1.0, 0.1, 0.0, math.inf])
def test_clipping_by_value_is_torchs_bit_for_bit(dtype: str, value: float) -> None:
    raw = np.array([-3.0, -0.1, 0.0, 0.1, 0.25, math.inf, -math.inf, math.nan])
    parameter = torch.zeros(8, dtype=getattr(torch, dtype))
    parameter.grad = torch.tensor(raw).to(parameter.dtype)
    torch.nn.utils.clip_grad_value_([parameter], value)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tree = {"a": jnp.asarray(raw, dtype), "b": None}
        for given in (value, jnp.asarray(value, "float32") if dtype == "bfloat16" else value):
            tx = optim.clip_grad_value(given)
            clipped, state = tx.update(tree, tx.init(tree))
            assert clipped["a"].dtype == dtype
            assert clipped["b"] is None
            wide = np.asarray(clipped["a"], np.float64)
            np.testing.assert_array_equal(wide, parameter.grad.double().numpy())
    assert state == optax.EmptyState()


def test_optax_widens_what_it_clips_by_an_array() -> None:
    bound, tree = jnp.float32(0.1), {"a": jnp.ones(2, jnp.bfloat16)}
    clipped = [tx.update(tree, optax.EmptyState())[0] for tx in
               (optax.clip(bound), optim.clip_grad_value(bound))]  # fmt: skip
    assert [one["a"].dtype.name for one in clipped] == ["float32", "bfloat16"]


def test_clipping_by_value_checks_what_it_knows() -> None:
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="clip_value must be at least 0, got clip_value="):
            optim.clip_grad_value(bad)
    tree = {"a": jnp.array([2.0])}
    clip = jax.jit(lambda v: optim.clip_grad_value(v).update(tree, optax.EmptyState())[0]["a"])
    assert clip(jnp.float32(0.5)).tolist() == [0.5]
