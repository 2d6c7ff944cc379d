"""The generator: PyTorch's draws in PyTorch's order."""

import math
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from flaxstab._checks import check, check_probability
from flaxstab._typing import Shape
from flaxstab.initializers import FanMode, Nonlinearity
from flaxstab.torch_rng import _init, _truncated
from flaxstab.torch_rng._arrays import (
    Floats,
    check_bounds,
    dimensions,
    filled,
    floating,
    held,
    limit_of,
    wide,
)
from flaxstab.torch_rng._box_muller import BLOCK, block_normals, normal_pair
from flaxstab.torch_rng._fused import fused

_WORDS = 624  # the Mersenne Twister's state
_LARGEST_PERMUTATION = 2**32 // 20  # PyTorch draws 64-bit numbers from here on


class Generator:
    """PyTorch's CPU generator, bit for bit, in numpy.

    Every method draws what its PyTorch counterpart draws and leaves the stream where PyTorch
    leaves it, so calls in the order of a model's construction give that model's initial weights.

    Bit-equal to PyTorch 2.13 on x86-64 with AVX2 and FMA: everything except what
    :meth:`trunc_normal` and :meth:`orthogonal` name. numpy computes the same numbers on any
    machine, but for normals that go through float64 (fewer than 16 at once, or dtype float64),
    which take the logarithm, sine and cosine of the C library at hand, as PyTorch does.

    Where PyTorch does without AVX2 and FMA, its uniforms, masks and permutations are the same and
    its normals differ in the last bits: with ``ATEN_CPU_CAPABILITY=default`` 61 % of the float32
    ones are equal, the others at most 2e-6 standard deviations away. Other architectures have not
    been measured. CUDA has another generator.

    Args:
      seed: an integer in [-2^63, 2^64). As in PyTorch, its low 32 bits count.

    Raises:
      ValueError: if the seed is no integer, or outside that range.

    Example:
      The numbers of ``torch.manual_seed(0); torch.randn(3); torch.rand(2)``:

      >>> from flaxstab.torch_rng import Generator
      >>> generator = Generator(0)
      >>> generator.normal(3)
      array([ 1.5409961, -0.2934289, -2.1787894], dtype=float32)
      >>> generator.uniform(2)
      array([0.45562798, 0.6323063 ], dtype=float32)

    Reference:
      M. Matsumoto, T. Nishimura, "Mersenne Twister: A 623-Dimensionally Equidistributed Uniform
      Pseudo-Random Number Generator", ACM TOMACS 8(1), 1998; seeding as in their code of 2002.
    """

    def __init__(self, seed: int) -> None:
        is_seed = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
        check(
            is_seed and -(2**63) <= seed < 2**64,
            "seed must be an integer in [-2**63, 2**64)",
            fix="Pass int(seed).",
            seed=seed,
        )
        self._bits = _twister(int(seed))
        self._spare: float | None = None  # the second normal of a pair, for the next serial draw

    def uniform(
        self,
        shape: Shape | int,
        low: float = 0.0,
        high: float = 1.0,
        dtype: DTypeLike = np.float32,
    ) -> np.ndarray:
        """Draws from U[low, high), as ``torch.empty(shape, dtype=dtype).uniform_(low, high)``.

        Args:
          shape: the result's shape.
          low: the least value.
          high: the bound above; a value that rounds up to it becomes ``low``.
          dtype: float32, float64, bfloat16 or float16. The 16-bit ones are computed in float32.

        Returns:
          An array of that shape and dtype.

        Raises:
          ValueError: if ``low``, ``high`` or their difference is outside the range of ``dtype``,
            ``low`` is above ``high``, or the shape or dtype does not fit.
        """
        kind, sizes = floating(dtype), dimensions(shape)
        check_bounds(low, high, kind)
        scalar = wide(kind).type
        width, start = scalar(high) - scalar(low), scalar(low)
        lowest, bound = held(low, kind), held(high, kind)

        def draw(count: int) -> np.ndarray:
            values = fused(self._units(count, kind), width, start).astype(kind)
            return np.where(values == bound, lowest, values)

        return filled(math.prod(sizes), kind, draw).reshape(sizes)

    def normal(
        self,
        shape: Shape | int,
        mean: float = 0.0,
        std: float = 1.0,
        dtype: DTypeLike = np.float32,
    ) -> np.ndarray:
        """Draws from N(mean, std²), as ``torch.empty(shape, dtype=dtype).normal_(mean, std)``.

        Below 16 elements PyTorch computes pairs in float64 and keeps the second normal of a pair
        for the next such draw; from 16 on it computes blocks of 16, and for a remainder draws the
        last 16 elements anew. (It fills memory that is not contiguous like fewer than 16.)

        Args:
          shape: the result's shape.
          mean: the mean.
          std: the standard deviation, at least 0.
          dtype: float32, float64, bfloat16 or float16. The 16-bit ones are computed in float32.

        Returns:
          An array of that shape and dtype.

        Raises:
          ValueError: if ``std`` is negative, a parameter is outside the range of the dtype in which
            it is computed, or the shape or dtype does not fit.
        """
        kind, sizes = floating(dtype), dimensions(shape)
        limit = limit_of(wide(kind))
        check(abs(mean) <= limit, f"mean must lie in [-{limit:.4g}, {limit:.4g}]", mean=mean)
        check(0 <= std <= limit, f"std must lie in [0, {limit:.4g}]", std=std)
        count = math.prod(sizes)
        draw = self._serial_normals if count < BLOCK else self._block_normals
        with np.errstate(over="ignore"):  # float16 overflows to inf, as in PyTorch
            return draw(count, mean, std, kind).reshape(sizes)

    def trunc_normal(
        self,
        shape: Shape | int,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        dtype: DTypeLike = np.float32,
        *,
        stream: Literal["rejection", "inverse"] = "rejection",
    ) -> np.ndarray:
        """Draws from N(mean, std²) cut to [a, b], as ``torch.nn.init.trunc_normal_``.

        Bit-equal where [a, b] holds more than 30 % of the distribution, as it does by default.
        Two cases rest on a logarithm or an inverse error function of Intel's MKL, which are
        computed here correctly rounded. With less than 30 % that changes a value only where MKL's
        last bit decides whether it is kept, less than once in 10^9 draws. With ``'inverse'`` less
        than 1 % of the float32 values differ, by a unit in the last place of that function, and
        most of the float64 ones, by about 1e-14 standard deviations at most.

        Args:
          shape: the result's shape.
          mean: the mean before the cut.
          std: the standard deviation before the cut, above 0.
          a: the lower bound: a value, not a multiple of ``std``.
          b: the upper bound.
          dtype: float32, float64, bfloat16 or float16.
          stream: ``'rejection'``, PyTorch from 2.12 on, or ``'inverse'``, PyTorch before that.

        Returns:
          An array of that shape and dtype.

        Raises:
          ValueError: if ``std`` is not positive, ``a`` is not below ``b``, ``stream`` is unknown,
            or :meth:`uniform` or :meth:`normal` would raise.
        """
        kind, sizes = floating(dtype), dimensions(shape)
        check(0 < std < math.inf, "std must be positive and finite", std=std)
        check(a < b, "a must be below b", a=a, b=b)
        check(
            stream in ("rejection", "inverse"),
            "stream must be 'rejection' (PyTorch from 2.12 on) or 'inverse' (before)",
            stream=stream,
        )
        draw = _truncated.by_rejection if stream == "rejection" else _truncated.by_inverse
        with np.errstate(over="ignore"):  # a bound beyond the dtype's range is inf, as in PyTorch
            return draw(self, sizes, _truncated.Law(mean, std, a, b), kind)

    def xavier_uniform(
        self, shape: Shape, gain: float = 1.0, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Draws as ``torch.nn.init.xavier_uniform_(torch.empty(shape), gain)``.

        Args:
          shape: a weight's in PyTorch: ``(out, in, *window)``; that of the result.
          gain: factor for the nonlinearity.
          dtype: float32, float64, bfloat16 or float16.

        Raises:
          ValueError: if the shape has fewer than two axes, or :meth:`uniform` would raise.
        """
        return _init.symmetric(self, shape, _init.xavier_std(shape, gain), dtype)

    def xavier_normal(
        self, shape: Shape, gain: float = 1.0, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Draws as ``torch.nn.init.xavier_normal_``; arguments as :meth:`xavier_uniform`."""
        return self.normal(shape, 0.0, _init.xavier_std(shape, gain), dtype)

    def kaiming_uniform(
        self,
        shape: Shape,
        a: float = 0.0,
        mode: FanMode = "fan_in",
        nonlinearity: Nonlinearity = "leaky_relu",
        dtype: DTypeLike = np.float32,
    ) -> np.ndarray:
        """Draws as ``torch.nn.init.kaiming_uniform_(torch.empty(shape), a, mode, nonlinearity)``.

        Args:
          shape: a weight's in PyTorch: ``(out, in, *window)``; that of the result.
          a: the negative slope of ``'leaky_relu'``.
          mode: ``'fan_in'`` or ``'fan_out'``.
          nonlinearity: see :func:`flaxstab.initializers.calculate_gain`.
          dtype: float32, float64, bfloat16 or float16.

        Raises:
          ValueError: if the shape has fewer than two axes, ``mode`` or ``nonlinearity`` is
            unknown, or :meth:`uniform` would raise.
        """
        return _init.symmetric(self, shape, _init.kaiming_std(shape, a, mode, nonlinearity), dtype)

    def kaiming_normal(
        self,
        shape: Shape,
        a: float = 0.0,
        mode: FanMode = "fan_in",
        nonlinearity: Nonlinearity = "leaky_relu",
        dtype: DTypeLike = np.float32,
    ) -> np.ndarray:
        """Draws as ``torch.nn.init.kaiming_normal_``; arguments as :meth:`kaiming_uniform`."""
        return self.normal(shape, 0.0, _init.kaiming_std(shape, a, mode, nonlinearity), dtype)

    def orthogonal(
        self, shape: Shape, gain: float = 1.0, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Draws as ``torch.nn.init.orthogonal_(torch.empty(shape), gain)``, to about 1e-6.

        The normals are PyTorch's; the last bits are decided by the QR factorisation of the LAPACK
        at hand. Measured in float32: 6e-7 apart for 40 columns, 2.4e-6 for 512.

        Args:
          shape: a weight's in PyTorch: ``(out, in, *window)``; that of the result.
          gain: factor on the orthogonal matrix.
          dtype: float32 or float64.

        Raises:
          ValueError: if the shape has fewer than two axes, or the dtype is of 16 bits.
        """
        return _init.orthogonal(self, shape, gain, dtype)

    def sparse(
        self, shape: Shape, sparsity: float, std: float = 0.01, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """Draws as ``torch.nn.init.sparse_(torch.empty(shape), sparsity, std)``.

        Args:
          shape: a matrix's, ``(out, in)``.
          sparsity: the share of zeros in each column, in [0, 1].
          std: the standard deviation of the rest.
          dtype: float32, float64, bfloat16 or float16.

        Raises:
          ValueError: if the shape has not two axes or ``sparsity`` is outside [0, 1].
        """
        return _init.sparse(self, shape, sparsity, std, dtype)

    def bernoulli(self, shape: Shape | int, p: float) -> np.ndarray:
        """Draws True with probability ``p``, as ``torch.empty(shape).bernoulli_(p)``.

        Differs from:
          ``torch.bernoulli(probabilities)``, which draws other numbers for a tensor of
          probabilities; and from builds of PyTorch that link the random numbers of Intel's MKL,
          which on Intel processors draw masks from a generator of MKL's. The official ones of
          2.13 do not.

        Args:
          shape: the result's shape.
          p: the probability of True.

        Raises:
          ValueError: if ``p`` is not a number in [0, 1], or the shape does not fit.
        """
        sizes = dimensions(shape)
        check(np.ndim(p) == 0, "p must be one number", p=p)
        check_probability(p=p)
        double = np.dtype(np.float64)

        def draw(count: int) -> np.ndarray:
            return self._units(count, double) < p

        return filled(math.prod(sizes), np.dtype(np.bool_), draw).reshape(sizes)

    def dropout_mask(self, shape: Shape | int, p: float) -> np.ndarray:
        """Draws which elements ``torch.nn.functional.dropout(x, p)`` keeps.

        Args:
          shape: that of ``x``; for ``dropout1d`` to ``dropout3d`` ``(N, C)``.
          p: the probability of dropping. As in PyTorch, 0 and 1 draw nothing.

        Returns:
          True where an element is kept.

        Raises:
          ValueError: as :meth:`bernoulli`.
        """
        check_probability(p=p)
        if p in (0, 1):
            return np.full(dimensions(shape), p == 0)
        return self.bernoulli(shape, 1 - p)

    def randperm(self, n: int) -> np.ndarray:
        """Draws a permutation of 0 to n - 1, as ``torch.randperm(n)``.

        Args:
          n: at least 0 and below 2^32 / 20, where PyTorch changes its algorithm.

        Raises:
          ValueError: if ``n`` is outside that range.
        """
        fits = isinstance(n, int | np.integer) and 0 <= n < _LARGEST_PERMUTATION
        check(fits, f"n must be an integer in [0, {_LARGEST_PERMUTATION})", n=n)
        order = list(range(n))
        steps = max(n - 1, 0)
        jumps = self._bits.random_raw(steps) % np.arange(n, n - steps, -1, dtype=np.uint64)
        for i, jump in enumerate(jumps.tolist()):
            order[i], order[i + jump] = order[i + jump], order[i]
        return np.array(order, np.int64)

    def _units(self, count: int, kind: np.dtype) -> Floats:
        """Draws numbers in [0, 1): 24 random bits in float32; 53, of two draws, in float64."""
        if kind.itemsize < 8:
            raw = self._bits.random_raw(count).astype(np.uint32)
            return (raw & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
        high, low = self._bits.random_raw(2 * count).reshape(-1, 2).T
        return ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53

    def _serial_normals(self, count: int, mean: float, std: float, kind: np.dtype) -> np.ndarray:
        values = np.array([self._serial_normal() for _ in range(count)], np.float64)
        return fused(values, float(std), float(mean)).astype(wide(kind)).astype(kind)

    def _serial_normal(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        value, self._spare = normal_pair(self._units(2, np.dtype(np.float64)).tolist())
        return value

    def _block_normals(self, count: int, mean: float, std: float, kind: np.dtype) -> np.ndarray:
        scalar = wide(kind).type

        def draw(count: int) -> np.ndarray:
            normals = block_normals(self._units(count, kind))
            return fused(normals, scalar(std), scalar(mean)).astype(kind)

        rest = count % BLOCK
        values = np.empty(count, kind)
        values[: count - rest] = filled(count - rest, kind, draw)
        if rest:
            # The wider dtypes have drawn a uniform for every element before the first normal.
            self._units(rest if kind.itemsize > 2 else 0, kind)
            values[-BLOCK:] = draw(BLOCK)
        return values


def _twister(seed: int) -> np.random.MT19937:
    """Returns a Mersenne Twister seeded with the low 32 bits of an integer."""
    key = [seed & 0xFFFFFFFF]
    for i in range(1, _WORDS):
        key.append((1812433253 * (key[-1] ^ key[-1] >> 30) + i) & 0xFFFFFFFF)
    bits = np.random.MT19937(0)
    bits.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(key, np.uint32), "pos": _WORDS},
    }
    return bits
