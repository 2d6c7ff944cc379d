"""Masks of dropout: which bits decide, how many hashes they take, and the law they follow."""

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flaxstab import functional
from flaxstab._typing import Array
from flaxstab.functional import _dropout, _masks
from flaxstab.parity import Budget, HasMean
from parity_tests.support.contracts import steps
from parity_tests.support.hashes import hashes
from parity_tests.support.random_checks import divided

KEY = jax.random.key(0)
EDGE = 2.0**-17
IMPLEMENTATIONS = (
    "threefry2x32", "rbg", "unsafe_rbg", "philox4x32", "philox2x32", "threefry4x32"
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects the threshold and the bits of every draw, and draws nothing."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(_dropout, "draw_mask", lambda _, t, bits, __: found.append((t, bits)))
    return found


def test_the_keep_probability_is_within_half_a_step_of_one_minus_p(
    asked: list[tuple[int, int]],
) -> None:
    """Exactly, on the integers; below 2⁻¹⁷ from 0 and 1 with more bits, and never 0 or 1."""
    rng = np.random.default_rng(0)
    chances = [*rng.random(500), *10.0 ** -rng.uniform(0, 20, 500), 0.1, 0.5, 1e-6, EDGE]
    chances += [1 - p for p in chances if p < 1] + [5e-324, 1 - 2.0**-53]
    inner = [p for p in chances if 0 < p < 1]
    for p in inner:
        functional.dropout_mask(KEY, p, (4,))
    for p, (threshold, bits) in zip(inner, asked, strict=True):
        assert 0 < threshold < 2**bits
        error = abs(Fraction(threshold, 2**bits) - (1 - Fraction(p)))
        assert bits == (16 if EDGE < p < 1 - EDGE else 32)
        # A whole step where the nearest threshold would be 0 or 1.
        assert error <= Fraction(1, 2**17) if bits == 16 else error < Fraction(1, 2**32)
    assert len(inner) > 1900


@pytest.mark.parametrize("p", [0, 1, 0.0, 1.0, np.float32(1)])
def test_nothing_is_drawn_for_p_0_and_1(p: float, asked: list[tuple[int, int]]) -> None:
    for shape in ((3, 4), ()):
        mask = functional.dropout_mask(KEY, p, shape)
        assert (mask.shape, mask.dtype, bool((mask == (p == 0)).all())) == (shape, bool, True)
    assert asked == []


def axis_of(shape: tuple[int, ...], sharing: int) -> int | None:
    inner = list(range(len(shape)))[1:-1][::-1]
    many = [0] if shape and shape[0] % 512 == 0 else []
    order = [*inner, *many, *([len(shape) - 1, 0] if shape else [])]
    return next((axis for axis in order if shape[axis] % sharing == 0), None)


def by_hand(key: Array, threshold: int, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Compares with Python's integers, element by element."""
    sharing, axis = 64 // bits, axis_of(shape, 64 // bits)
    if axis is None:
        n = math.prod(shape)
        return by_hand(key, threshold, bits, (-(-n // sharing) * sharing,))[:n].reshape(shape)
    hashes = [n // sharing if i == axis else n for i, n in enumerate(shape)]
    words = np.asarray(jax.random.key_data(jax.random.split(key, hashes)))
    kept = np.zeros(shape, bool)
    for place in np.ndindex(shape):
        hashed = tuple(i // sharing if a == axis else i for a, i in enumerate(place))
        first, second = (int(word) for word in words[hashed])
        both = first | second << 32
        number = both >> bits * (place[axis] % sharing) & 2**bits - 1
        kept[place] = number < threshold
    return kept


SHAPES = [(), (7,), (4, 8), (4, 3), (512, 4), (2, 8, 3), (2, 5, 12), (3, 4, 8, 2), (0, 4)]


def test_neighbours_share_a_hash_and_each_bit_is_used_once() -> None:
    found = jax.jit(lambda key: [functional.dropout_mask(key, 0.3, s) for s in SHAPES])(KEY)
    for mask, shape in zip(found, SHAPES, strict=True):
        np.testing.assert_array_equal(mask, by_hand(KEY, 45875, 16, shape))  # 0.7 * 65536 = 45875.2


@pytest.mark.parametrize("shape", [(9,), (3, 2, 5)])
def test_with_32_bits_two_share_a_hash(shape: tuple[int, ...]) -> None:
    found = _masks.draw_mask(KEY, 2**31 + 12345, 32, shape)
    np.testing.assert_array_equal(found, by_hand(KEY, 2**31 + 12345, 32, shape))


@pytest.mark.parametrize("bits", [16, 32])
def test_the_threshold_itself_is_dropped(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two words with the largest and the smallest number either side of the threshold."""
    low, high = (12345, 12344) if bits == 16 else (2**32 - 1, 2**32 - 2)
    words = [low << 16 | high, 65535] if bits == 16 else [low, high]
    monkeypatch.setattr(_masks, "_words", lambda _, shape: np.full((*shape, 2), words, np.uint32))
    _masks.draw_mask.clear_cache()
    found = _masks.draw_mask(KEY, low, bits, (64 // bits,))
    _masks.draw_mask.clear_cache()
    assert found.tolist() == ([True, False, False, True] if bits == 16 else [False, True])


def test_axes_of_size_1_do_not_change_a_mask() -> None:
    plain = functional.dropout_mask(KEY, 0.5, (6, 20))
    for shape in ((6, 1, 20), (6, 1, 1, 20)):
        np.testing.assert_array_equal(
            functional.dropout_mask(KEY, 0.5, shape).reshape(6, 20), plain
        )


@pytest.mark.parametrize(
    "shape", [(), (8,), (7, 5), (16, 12), (3, 8, 5), (2, 3, 4, 7), (8192, 768)]
)
def test_a_mask_takes_one_hash_for_four_elements(shape: tuple[int, ...]) -> None:
    n = math.prod(shape)
    assert hashes(lambda key: functional.dropout_mask(key, 0.1, shape), KEY) == -(-n // 4)
    assert hashes(lambda key: jax.random.bernoulli(key, 0.9, shape), KEY) == n
    assert hashes(lambda key: functional.dropout_mask(key, 1e-6, shape), KEY) == -(-n // 2)


def test_a_mask_is_drawn_forward_and_backward_and_once_more_in_a_region_of_a_region() -> None:
    x = jnp.ones((8, 16))

    def drawn(drop: Callable[[Array, Array], Array], region: Callable[..., object]) -> float:
        inner = region(lambda x, key: jnp.tanh(drop(x, key)))
        return hashes(jax.grad(lambda x, key: jnp.sum(inner(x, key))), x, KEY) / (x.size // 4)

    def itself(x: Array, key: Array) -> Array:
        return functional.random_dropout(x, 0.1, key)

    def by_mask(x: Array, key: Array) -> Array:
        return functional.dropout(x, 0.1, functional.dropout_mask(key, 0.1, x.shape))

    assert drawn(itself, lambda f: f) == drawn(by_mask, jax.checkpoint) == 2
    assert drawn(itself, jax.checkpoint) == 3


def hashed(compiled: jax.stages.Compiled) -> set[int]:
    """Sizes of the arrays that are hashed: for a CPU Threefry is a loop over them."""
    loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
    arrays = (re.findall(r"u32\[(\d[\d,]*)\]", line) for line in loops)
    sizes = {math.prod(map(int, shape.split(","))) for found in arrays for shape in found}
    return {size for size in sizes if size > 4}  # others are the loop's constants


def test_the_compiled_program_takes_no_more_hashes() -> None:
    """Neither forward nor backward; bernoulli hashes once for each element."""
    x = jnp.ones((64, 96), jnp.bfloat16)

    def compiled(mask: Callable[[Array], Array]) -> jax.stages.Compiled:
        def both(x: Array, key: Array) -> object:
            return jax.value_and_grad(lambda x: jnp.sum(x * jnp.asarray(mask(key), x.dtype)))(x)

        return jax.jit(both).lower(x, KEY).compile()

    assert hashed(compiled(lambda key: functional.dropout_mask(key, 0.1, x.shape))) == {x.size // 4}
    assert hashed(compiled(lambda key: jax.random.bernoulli(key, 0.9, x.shape))) == {x.size}


def test_integers_alone_decide() -> None:
    """No platform rounds them."""
    for key in (KEY, jax.random.PRNGKey(0)):
        program = jax.make_jaxpr(lambda key: functional.dropout_mask(key, 0.3, (8, 12)))(key)
        kinds = {str(v.aval.dtype) for step in steps(program) for v in step.outvars}
        assert kinds <= {"uint8", "uint32", "bool", "key<fry>"}


SHARDED = [
    ((16, 32, 64), ("d",)), ((16, 32, 64), (None, "d")), ((16, 32, 64), (None, None, "d")),
    ((8, 64), ("d",)), ((1024, 12), ("d",)), ((1024, 64), (None, "d")),
]  # fmt: skip


def test_a_sharded_mask_is_the_same_and_nothing_is_exchanged() -> None:
    """Each device draws its own part: of the batch, of the steps or of the features."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for _, spec in SHARDED]

    def draw(key: Array) -> list[Array]:
        return [functional.dropout_mask(key, 0.3, shape) for shape, _ in SHARDED]

    spread = jax.jit(draw, out_shardings=shardings).lower(KEY).compile()
    exchange = r"all-gather|all-to-all|all-reduce|collective-permute"
    assert not re.search(exchange, spread.as_text())
    assert hashed(spread) == {math.prod(shape) // 4 // 8 for shape, _ in SHARDED}
    for ours, alone in zip(spread(KEY), jax.jit(draw)(KEY), strict=True):
        np.testing.assert_array_equal(ours, alone)
        assert len(ours.sharding.device_set) == 8


def test_masks_of_many_keys_are_drawn_at_once() -> None:
    """Also with rbg keys, of which ``jax.random`` itself uses one under vmap."""

    def draw(key: Array) -> Array:
        return functional.dropout_mask(key, 0.5, (5, 20))

    implementations = ("threefry2x32", "unsafe_rbg", "philox2x32")
    keys = [jax.random.split(jax.random.key(1, impl=impl), 3) for impl in implementations]
    for together in jax.jit(lambda keys: [(jax.vmap(draw)(k), draw(k[1])) for k in keys])(keys):
        np.testing.assert_array_equal(together[0][1], together[1])
        assert len({mask.tobytes() for mask in np.asarray(together[0])}) == 3


def test_a_raw_key_draws_what_its_typed_one_does() -> None:
    raw = jax.random.PRNGKey(5)
    typed = functional.dropout_mask(jax.random.wrap_key_data(raw), 0.5, (40,))
    np.testing.assert_array_equal(functional.dropout_mask(raw, 0.5, (40,)), typed)


def test_every_word_of_an_rbg_key_counts() -> None:
    words = [[1, 2, 3, 4]] + [
        [1 + (i == 0), 2 + (i == 1), 3 + (i == 2), 4 + (i == 3)] for i in range(4)
    ]
    keys = jax.random.wrap_key_data(np.array(words, np.uint32), impl="rbg")
    masks = jax.vmap(lambda key: functional.dropout_mask(key, 0.5, (64,)))(keys)
    assert len({mask.tobytes() for mask in np.asarray(masks)}) == len(words)


DRAWS = 2_000_000


def assert_independent(a: np.ndarray, b: np.ndarray, budget: Budget) -> None:
    """Both of a pair are kept with probability 1/4: 0.008 off, of 500,000 pairs, is found."""
    found = HasMean(0.25, discrepancy=0.008).check(a & b, budget)
    assert found.passed, str(found)


def test_elements_of_one_hash_are_independent(budget: Budget) -> None:
    lanes = np.asarray(functional.dropout_mask(KEY, 0.5, (DRAWS,))).reshape(-1, 4)
    for i, j in itertools.combinations(range(4), 2):
        assert_independent(lanes[:, i], lanes[:, j], budget)
    parity = np.logical_xor.reduce(lanes, 1)  # as good a coin as each of them
    found = HasMean(0.5, discrepancy=0.01).check(parity, budget)
    assert found.passed, str(found)
    with pytest.raises(AssertionError):
        assert_independent(lanes[:, 0], lanes[:, 0], divided(budget, 1))


def test_elements_of_neighbouring_hashes_are_independent(budget: Budget) -> None:
    """Along the axis that is shared, across its hashes, and along the others."""
    kept = np.asarray(functional.dropout_mask(KEY, 0.5, (250, 16, 500)))
    for lag in (1, 2, 4):
        pairs = kept.reshape(250, -1, 2, lag, 500)
        assert_independent(pairs[:, :, 0], pairs[:, :, 1], budget)
    assert_independent(kept[:, :, ::2], kept[:, :, 1::2], budget)
    assert_independent(kept[::2], kept[1::2], budget)


def test_masks_of_related_keys_are_independent(budget: Budget) -> None:
    keys = [KEY, *jax.random.split(KEY), *(jax.random.fold_in(KEY, n) for n in range(2))]
    masks = [np.asarray(functional.dropout_mask(key, 0.5, (DRAWS // 4,))) for key in keys]
    for i, j in ((0, 1), (0, 3), (1, 2), (3, 4)):
        assert_independent(masks[i], masks[j], budget)


def test_masks_of_every_implementation_follow_the_law(budget: Budget) -> None:
    """A seed fills an rbg key twice: by its own words four elements would equal the next four."""
    for impl in IMPLEMENTATIONS:
        key = jax.random.key(3, impl=impl)
        eights = np.asarray(functional.dropout_mask(key, 0.5, (DRAWS,))).reshape(-1, 8)
        assert_independent(eights[:, :4], eights[:, 4:], budget)
