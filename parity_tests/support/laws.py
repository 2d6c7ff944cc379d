"""The laws of ``torch.nn.init`` in closed form, as named checks of draws.

Sample sizes are chosen for the checks' power at the suite's budget: it takes 1.9 million to find a
normal law whose mean or standard deviation is off by 1 % of the latter.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr
from scipy.stats import norm, truncnorm

from flaxstab._typing import Initializer
from flaxstab.parity import Budget, Evidence, HasCdf, HasMean, IsNormal

SEED = 0
COUNT = 1_900_000
ENOUGH = 1_250_000  # for a distribution function
CUT_COUNT = 3_300_000  # a truncated law shows less of its standard deviation
ROWS, COLUMNS, ZEROS = 330_000, 10, 4  # of sparse: 2 million values that are not 0
MATRICES = 150_000

Event = Callable[[np.ndarray], np.ndarray]
Check = Callable[[np.ndarray, Budget], Evidence]
Draw = Callable[[Initializer], np.ndarray]


class Law(NamedTuple):
    """An initializer, how it is drawn from, and the checks of its law by name."""

    init: Initializer
    draw: Draw
    checks: dict[str, Check]


def once(*shape: int, dtype: str = "float32") -> Draw:
    """Draws one array."""

    def draw(init: Initializer) -> np.ndarray:
        drawn = np.asarray(init(jax.random.key(SEED), shape, dtype), np.float64)
        return drawn if len(shape) == 2 else drawn.ravel()

    return draw


def many(*shape: int) -> Draw:
    """Draws kernels and flattens all axes but the last, as PyTorch does."""

    def draw(init: Initializer) -> np.ndarray:
        keys = jax.random.split(jax.random.key(SEED), MATRICES)
        drawn = jax.jit(jax.vmap(lambda key: init(key, shape, jnp.float32)))(keys)
        return np.asarray(drawn, np.float64).reshape(MATRICES, -1, shape[-1])

    return draw


def rate(event: Event, expected: float, discrepancy: float) -> Check:
    claim = HasMean(expected, discrepancy=discrepancy)
    return lambda x, budget: claim.check(event(x), budget)


def never(event: Event) -> Check:
    return rate(event, 0.0, 2e-4)


def shape_of(low: float, high: float, cdf: Event, ends: tuple[float, float]) -> dict[str, Check]:
    """No values outside, 0.1 % of them beyond either end, and the whole distribution function."""
    slack = np.finfo(np.float32).eps * max(abs(low), abs(high))
    claim = HasCdf(cdf, discrepancy=0.006)
    return {
        "support": never(lambda x: (x < low - slack) | (x > high + slack)),
        "low end": rate(lambda x: x < ends[0], 0.001, 0.001),
        "high end": rate(lambda x: x > ends[1], 0.001, 0.001),
        "distribution": lambda x, budget: claim.check(x[:ENOUGH], budget),
    }


def moments(low: float, high: float, mean: float, variance: float) -> dict[str, Check]:
    """In units of the distance to the farther end; values outside count as the end."""
    reach = max(mean - low, high - mean)
    first = HasMean(0.0, low=(low - mean) / reach, high=(high - mean) / reach, discrepancy=0.01)
    second = HasMean(variance / reach**2, discrepancy=0.0067)  # of a uniform law: 1 % of the std

    def scaled(x: np.ndarray) -> np.ndarray:
        return np.clip((x - mean) / reach, first.low, first.high)

    return {
        "mean": lambda x, budget: first.check(scaled(x), budget),
        "variance": lambda x, budget: second.check(scaled(x) ** 2, budget),
    }


def uniform(low: float, high: float) -> dict[str, Check]:
    def cdf(x: np.ndarray) -> np.ndarray:
        return np.clip((x - low) / (high - low), 0, 1)

    width, middle = high - low, (low + high) / 2
    ends = low + 0.001 * width, high - 0.001 * width
    return {**shape_of(low, high, cdf, ends), **moments(low, high, middle, width**2 / 12)}


def rounded(low: float, high: float, dtype: str) -> dict[str, Check]:
    """U(low, high) in a 16-bit dtype, as PyTorch has it: what rounds up to ``high`` is ``low``."""
    kind = jnp.dtype(dtype)
    largest = int(np.asarray(jnp.finfo(kind).max, kind).view(np.uint16))
    positive = np.arange(largest + 1, dtype=np.uint16).view(kind).astype(np.float64)
    values = np.concatenate([-positive, positive])
    first, bound = (float(np.asarray(x, np.float32).astype(kind)) for x in (low, high))
    atoms = np.unique(values[(values >= first) & (values <= bound)])
    below = np.clip(((atoms[:-1] + atoms[1:]) / 2 - low) / (high - low), 0, 1)
    until = np.concatenate([[0], below + (1 - below[-1])])  # the last atom's part is the first's
    claim = HasCdf(lambda x: until[np.searchsorted(atoms[:-1], x, "right")], discrepancy=0.006)
    chances = np.diff(until)
    mean = float(chances @ atoms[:-1])
    variance = float(chances @ (atoms[:-1] - mean) ** 2)
    return {
        "support": never(lambda x: (x < first) | (x >= bound)),
        "lowest": rate(lambda x: x == first, chances[0], chances[0]),
        "distribution": lambda x, budget: claim.check(x[:ENOUGH], budget),
        **moments(first, bound, mean, variance),
    }


def symmetric(std: float) -> dict[str, Check]:
    return uniform(-math.sqrt(3) * std, math.sqrt(3) * std)


def normal(mean: float, std: float) -> dict[str, Check]:
    tail = 2 * norm.sf(3.7)  # 400 of them; without a bound that does not grow with n
    claim = HasCdf(lambda x: ndtr((x - mean) / std), discrepancy=0.006)
    return {
        "moments": lambda x, b: IsNormal(mean, std, discrepancy=0.01).check(x, b),
        "tails": rate(lambda x: np.abs(x - mean) > 3.7 * std, tail, tail),
        "distribution": lambda x, budget: claim.check(x[:ENOUGH], budget),
    }


def truncated(mean: float, std: float, a: float, b: float) -> dict[str, Check]:
    """The core is the interval that loses most when the standard deviation is 1 % larger."""

    def cdf(x: np.ndarray, std: float = std) -> np.ndarray:
        low, at, high = (ndtr((bound - mean) / std) for bound in (a, np.clip(x, a, b), b))
        return (at - low) / (high - low)

    points = np.linspace(a, b, 1001)
    gained = cdf(points, 1.01 * std) - cdf(points)
    left, right = points[gained.argmax()], points[gained.argmin()]
    left, right = min(left, right), max(left, right)
    inside, wider = (float(cdf(right, s) - cdf(left, s)) for s in (std, 1.01 * std))
    law = truncnorm((a - mean) / std, (b - mean) / std, mean, std)
    return {
        **shape_of(a, b, cdf, (law.ppf(0.001), law.ppf(0.999))),
        **moments(a, b, law.mean(), law.var()),
        "core": rate(lambda x: (x > left) & (x < right), inside, abs(inside - wider)),
    }


PLACES = np.full(2**COLUMNS, -1)  # the number of each set of ZEROS columns
for number, places in enumerate(itertools.combinations(range(COLUMNS), ZEROS)):
    PLACES[sum(1 << place for place in places)] = number
SETS = math.comb(COLUMNS, ZEROS)


def sparse(std: float) -> dict[str, Check]:
    """All sets of places are equally likely, and another row has another."""

    def chosen(x: np.ndarray) -> np.ndarray:
        return PLACES[(x == 0) @ (1 << np.arange(COLUMNS))]

    equal = HasCdf(lambda n: np.clip(np.floor(n) + 1, 0, SETS) / SETS, discrepancy=0.02)
    both = (ZEROS / COLUMNS) ** 2

    def of_values(check: Check) -> Check:
        return lambda x, budget: check(x[x != 0], budget)

    return {
        "count": never(lambda x: (x == 0).sum(1) != ZEROS),
        "places": lambda x, budget: equal.check(chosen(x), budget),
        "rows": rate(lambda x: (x[::2, 0] == 0) & (x[1::2, 0] == 0), both, 0.02),
        **{name: of_values(check) for name, check in normal(0.0, std).items()},
    }


def orthogonal(gain: float, *, square: bool) -> dict[str, Check]:
    """Orthonormal, and uniformly so: each component of a direction in three dimensions is."""
    # Three reflections, each of three sums of three products (the worst of 450,000: 6.2 eps).
    loose = 27 * np.finfo(np.float32).eps

    def error(x: np.ndarray) -> np.ndarray:
        tall = (x if x.shape[1] >= x.shape[2] else x.swapaxes(1, 2)) / gain
        return np.abs(np.einsum("nij,nik->njk", tall, tall) - np.eye(tall.shape[2])).max((1, 2))

    claim = HasCdf(lambda x: np.clip((x / gain + 1) / 2, 0, 1), discrepancy=0.02)

    def component(of: Callable[[np.ndarray], np.ndarray]) -> Check:
        return lambda x, budget: claim.check(of(x), budget)

    def askew(x: np.ndarray) -> np.ndarray:
        rows, columns = (np.arange(1.0, 1 + size) for size in x.shape[1:])
        return np.einsum("nij,i,j->n", x, *(v / np.linalg.norm(v) for v in (rows, columns)))

    found = {
        "orthonormal": never(lambda x: error(x) > loose),
        "first entry": component(lambda x: x[:, 0, 0]),
        "last entry": component(lambda x: x[:, -1, -1]),
        "askew": component(askew),
    }
    half = rate(lambda x: np.linalg.det(x) > 0, 0.5, 0.02)
    return {**found, "reflections": half} if square else found
