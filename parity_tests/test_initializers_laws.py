"""Initializers: draws against the laws of ``torch.nn.init`` in closed form, and planted faults.

Every law has checks of its support, mean, spread and whole distribution (``support/laws.py``). All
checks of the suite together fail with a probability of at most 1e-6 if every law is right, whatever
the seed; a law that is off by a check's discrepancy passes it with 1e-6 at most.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import truncnorm

from flaxstab._typing import Initializer
from flaxstab.initializers import (
    kaiming_normal,
    kaiming_uniform,
    normal,
    orthogonal,
    sparse,
    torch_attention,
    torch_bias,
    torch_embedding,
    torch_recurrent,
    torch_weight,
    trunc_normal,
    uniform,
    xavier_normal,
    xavier_uniform,
)
from flaxstab.parity import Budget, IsNormal
from parity_tests.support import laws, random_checks
from parity_tests.support.laws import Law, many, once

SHAPE = (5, 5, 250, 304)  # 1.9 million: (*window, in, out)
FAN_IN, FAN_OUT = 25 * 250, 25 * 304
XAVIER, KAIMING = math.sqrt(2 / (FAN_IN + FAN_OUT)), math.sqrt(2 / FAN_IN)
GAIN = 1 / 32 / (math.sqrt(3) * XAVIER)  # to a bound that 16 bits hold
KERNEL, VECTOR, CUT = once(*SHAPE), once(laws.COUNT), once(laws.CUT_COUNT)
PACKED = math.sqrt(2 / (1000 + 3 * 1900))

LAWS = {
    "uniform": Law(uniform(), VECTOR, laws.uniform(0, 1)),
    "uniform, wide": Law(uniform(-3.0, 5.0), VECTOR, laws.uniform(-3, 5)),
    "uniform, float16": Law(
        uniform(), once(laws.COUNT, dtype="float16"), laws.rounded(0, 1, "float16")
    ),
    "normal": Law(normal(), VECTOR, laws.normal(0, 1)),
    "normal, moved": Law(normal(-2.0, 0.5), VECTOR, laws.normal(-2, 0.5)),
    "trunc_normal": Law(trunc_normal(), CUT, laws.truncated(0, 1, -2, 2)),
    "trunc_normal, moved": Law(
        trunc_normal(1.0, 0.5, 0.0, 2.5), CUT, laws.truncated(1, 0.5, 0, 2.5)
    ),
    "trunc_normal, tail": Law(trunc_normal(a=3.0, b=5.0), CUT, laws.truncated(0, 1, 3, 5)),
    "xavier_uniform": Law(xavier_uniform(), KERNEL, laws.symmetric(XAVIER)),
    "xavier_uniform, bfloat16": Law(
        xavier_uniform(GAIN),
        once(*SHAPE, dtype="bfloat16"),
        laws.rounded(-1 / 32, 1 / 32, "bfloat16"),
    ),
    "xavier_normal": Law(xavier_normal(), KERNEL, laws.normal(0, XAVIER)),
    "kaiming_uniform": Law(kaiming_uniform(), KERNEL, laws.symmetric(KAIMING)),
    "kaiming_normal": Law(kaiming_normal(), KERNEL, laws.normal(0, KAIMING)),
    "torch_weight": Law(torch_weight(), KERNEL, laws.symmetric(KAIMING / math.sqrt(6))),
    "torch_bias": Law(torch_bias(256), VECTOR, laws.uniform(-1 / 16, 1 / 16)),
    "torch_embedding": Law(torch_embedding(), once(1900, 1, 1000), laws.normal(0, 1)),
    "torch_attention": Law(torch_attention(), once(1, 1000, 1900), laws.symmetric(PACKED)),
    "torch_recurrent": Law(torch_recurrent(256), VECTOR, laws.uniform(-1 / 16, 1 / 16)),
    "sparse": Law(sparse(0.35), once(laws.ROWS, laws.COLUMNS), laws.sparse(0.01)),
    "orthogonal": Law(orthogonal(), many(3, 3), laws.orthogonal(1, square=True)),
    "orthogonal, tall": Law(orthogonal(0.5), many(3, 1, 2), laws.orthogonal(0.5, square=False)),
    "orthogonal, wide": Law(orthogonal(), many(2, 3), laws.orthogonal(1, square=False)),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_obey_the_law(name: str, budget: Budget) -> None:
    law = LAWS[name]
    drawn = law.draw(law.init)
    found = [check(drawn, budget) for check in law.checks.values()]
    assert all(evidence.passed for evidence in found), "\n".join(map(str, found))


def changed(init: Initializer, change: Callable[[jax.Array], jax.Array]) -> Initializer:
    return lambda key, shape, dtype: change(init(key, shape, dtype))


def bent(power: float) -> Initializer:
    """Values of U(-3, 5), moved towards the middle or the ends."""

    def bend(v: jax.Array) -> jax.Array:
        return 1 + 4 * jnp.sign(v) * jnp.abs(v) ** power

    return changed(uniform(-1.0, 1.0), bend)


def in_bfloat16(key: jax.Array, shape: tuple[int, ...], _: object) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def in_its_dtype(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return stock.variance_scaling(GAIN**2, "fan_avg", "uniform")(key, shape, dtype)


def cast(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """What rounds up to the bound is the bound."""
    return xavier_uniform(GAIN)(key, shape, "float32").astype(dtype)


def cut_below(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """What rounds up to the bound is the value below it."""
    return jnp.minimum(cast(key, shape, dtype), jnp.nextafter(jnp.asarray(1 / 32, dtype), 0))


def without_signs(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
    """The QR decomposition as LAPACK leaves it."""
    return jnp.linalg.qr(jax.random.normal(key, shape, dtype))[0]


def rotation(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
    q = orthogonal()(key, shape, dtype)
    return q.at[:, 0].multiply(jnp.linalg.det(q))


def one_half(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
    q = orthogonal(0.5)(key, shape, dtype)
    return q * jnp.sign(q[-1:])


def with_zeros(kept: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
        return jnp.where(kept(key, shape), normal(std=0.01)(key, shape, dtype), 0)

    return init


def same_places(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    kept = jax.random.permutation(key, shape[1]) >= laws.ZEROS
    return jnp.broadcast_to(kept[None], shape)


def first_places(_: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(shape[1])[None] >= laws.ZEROS, shape)


def by_chance(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, 1 - laws.ZEROS / laws.COLUMNS, shape)


class Fault(NamedTuple):
    """What is wrong, the law that it breaks, the check that must see it, the faulty initializer."""

    name: str
    law: str
    check: str
    init: Initializer


stock = jax.nn.initializers
JAX_CUT = stock.truncated_normal(0.5, lower=0.0, upper=2.5)
CORRECTED = 1 / truncnorm.std(-2, 2)
FAULTS = (
    Fault("gain 1 % large", "xavier_uniform", "support", xavier_uniform(1.01)),
    Fault("gain 1 % small", "xavier_uniform", "high end", xavier_uniform(0.99)),
    Fault("upper bound off", "uniform, wide", "high end", uniform(-3.0, 4.96)),
    Fault("lower bound off", "uniform, wide", "low end", uniform(-2.96, 5.0)),
    Fault("JAX's bounds", "uniform", "distribution", stock.uniform()),
    Fault("bent inwards", "uniform, wide", "distribution", bent(1.05)),
    Fault("bent outwards", "uniform, wide", "variance", bent(0.95)),
    Fault("moved", "uniform, wide", "mean", uniform(-2.9, 5.0)),
    Fault("cast", "xavier_uniform, bfloat16", "support", cast),
    Fault("cut", "xavier_uniform, bfloat16", "lowest", cut_below),
    Fault("drawn so", "xavier_uniform, bfloat16", "distribution", in_its_dtype),
    Fault("bound 2 % near", "uniform, float16", "mean", uniform(0.0, 0.98)),
    Fault("both 1 % near", "uniform, float16", "variance", uniform(0.01, 0.99)),
    Fault("fan out", "kaiming_uniform", "low end", kaiming_uniform(mode="fan_out")),
    Fault("gain 1", "kaiming_uniform", "variance", kaiming_uniform(nonlinearity="linear")),
    Fault("fan in", "xavier_uniform", "support", stock.lecun_uniform()),
    Fault("normal", "torch_weight", "support", stock.lecun_normal()),
    Fault("Flax's spread", "torch_weight", "support", stock.lecun_uniform()),
    Fault("fan off", "torch_bias", "support", torch_bias(250)),
    Fault("apart", "torch_attention", "support", torch_attention(1)),
    Fault("size off", "torch_recurrent", "low end", torch_recurrent(262)),
    Fault("std 1 % large", "normal", "moments", normal(std=1.01)),
    Fault("std 1 % small", "normal, moved", "moments", normal(-2.0, 0.495)),
    Fault("mean 1 % of std off", "normal", "moments", normal(0.01)),
    Fault("JAX's spread", "normal", "moments", stock.normal()),
    Fault("drawn in bfloat16", "normal", "tails", in_bfloat16),
    Fault("cut at 3.7", "normal", "tails", trunc_normal(a=-3.7, b=3.7)),
    Fault("uniform", "normal", "distribution", uniform(-(3**0.5), 3**0.5)),
    Fault("truncated", "kaiming_normal", "tails", stock.he_normal()),
    Fault("truncated", "xavier_normal", "distribution", stock.glorot_normal()),
    Fault("fan out", "kaiming_normal", "moments", kaiming_normal(mode="fan_out")),
    Fault("gain 1", "kaiming_normal", "moments", kaiming_normal(nonlinearity="linear")),
    Fault("axes", "kaiming_normal", "moments", kaiming_normal(in_axis=-1, out_axis=-2)),
    Fault("Flax's spread", "torch_embedding", "moments", stock.normal(1000**-0.5)),
    Fault("std 1 % large", "trunc_normal", "core", trunc_normal(std=1.01)),
    Fault("std 1 % small", "trunc_normal, moved", "core", trunc_normal(1.0, 0.495, 0.0, 2.5)),
    Fault("std 1 % large", "trunc_normal, tail", "core", trunc_normal(0.0, 1.01, 3.0, 5.0)),
    Fault("bound 1 % far", "trunc_normal", "support", trunc_normal(a=-2.02)),
    Fault("upper bound 1 % near", "trunc_normal", "high end", trunc_normal(b=1.98)),
    Fault("lower bound 1 % near", "trunc_normal", "low end", trunc_normal(a=-1.98)),
    Fault("mean off", "trunc_normal", "mean", trunc_normal(0.04)),
    Fault("spread corrected", "trunc_normal", "variance", trunc_normal(std=CORRECTED)),
    Fault(
        "JAX's correction", "trunc_normal", "support",
        changed(stock.truncated_normal(1.0), lambda x: x * CORRECTED),
    ),
    Fault(
        "clipped", "trunc_normal", "distribution",
        changed(stock.normal(1.0), lambda x: x.clip(-2, 2)),
    ),
    Fault(
        "JAX's bounds", "trunc_normal, moved", "low end", changed(JAX_CUT, lambda x: 1 + x)
    ),
    Fault("rounded down", "sparse", "count", sparse(0.3)),
    Fault("zeros by chance", "sparse", "count", with_zeros(by_chance)),
    Fault("always the first", "sparse", "places", with_zeros(first_places)),
    Fault("one choice for all", "sparse", "rows", with_zeros(same_places)),
    Fault("std 1 % large", "sparse", "moments", sparse(0.35, 0.0101)),
    Fault(
        "truncated", "sparse", "tails", changed(sparse(0.35), lambda x: x.clip(-0.036, 0.036))
    ),
    Fault("signs", "sparse", "distribution", changed(sparse(0.35), lambda x: jnp.sign(x) / 99)),
    Fault("gain 1 % large", "orthogonal, tall", "orthonormal", orthogonal(0.505)),
    Fault("not orthogonal", "orthogonal, wide", "orthonormal", stock.normal(3**-0.5)),
    Fault("no signs", "orthogonal", "first entry", without_signs),
    Fault("no signs", "orthogonal", "askew", without_signs),
    Fault("no signs", "orthogonal", "reflections", without_signs),
    Fault("rotations alone", "orthogonal", "reflections", rotation),
    Fault("one half", "orthogonal, tall", "last entry", one_half),
)  # fmt: skip


def test_every_planted_fault_is_found_by_its_check(budget: Budget) -> None:
    paid = random_checks.for_faults(budget, len(FAULTS))
    missed = []
    for fault in FAULTS:
        law = LAWS[fault.law]
        if law.checks[fault.check](law.draw(fault.init), paid).passed:
            missed.append(fault)
    assert missed == []


def test_every_check_of_every_kind_of_law_has_a_fault() -> None:
    """Laws with the same checks are of one kind; of orthogonal ones the square are reflected."""
    kinds = {name: frozenset(law.checks) - {"reflections"} for name, law in LAWS.items()}
    wanted = {(kinds[name], check) for name, law in LAWS.items() for check in law.checks}
    assert wanted - {(kinds[fault.law], fault.check) for fault in FAULTS} == set()


@pytest.mark.parametrize("name", ["trunc_normal", "xavier_uniform", "kaiming_normal"])
def test_torchs_own_draws_pass_the_same_checks(name: str, budget: Budget) -> None:
    torch.manual_seed(laws.SEED)
    shape = (laws.CUT_COUNT,) if name == "trunc_normal" else (304, 250, 5, 5)
    drawn = getattr(torch.nn.init, f"{name}_")(torch.empty(shape)).double().numpy().ravel()
    found = [check(drawn, budget) for check in LAWS[name].checks.values()]
    assert all(evidence.passed for evidence in found), "\n".join(map(str, found))


def test_bfloat16_normals_have_more_than_128_values(budget: Budget) -> None:
    """Drawn in bfloat16, as JAX does, a million normals have 128 values and none above 2.9.

    That none of 1.9 million is above 3.7 has the probability 1e-178. Rounding them to bfloat16
    widens the law by less than 1e-5.
    """
    low = np.asarray(normal()(jax.random.key(laws.SEED), (laws.COUNT,), jnp.bfloat16), np.float64)
    assert len(np.unique(low)) > 2000
    evidence = IsNormal(discrepancy=0.01).check(low, budget)
    assert evidence.passed, evidence
    assert np.abs(low).max() > 3.7
