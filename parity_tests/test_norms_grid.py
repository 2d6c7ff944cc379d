"""Every option of every norm on every rank and batch size against PyTorch in float64."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import functional, norms
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_twins
from parity_tests.support.norm_grid import Twin, check, twin

C = 4
SPACE = {"(N, C)": (), "(N, L, C)": (3,), "(N, H, W, C)": (2, 3), "(N, D, H, W, C)": (2, 1, 2)}
WITH_SPACE = [rank for rank in SPACE if SPACE[rank]]
BATCHES = (0, 1, 2, 5, 64)
# The eps tell whose is used: 1e-3 moves an output of deviation 2 by 1e-4.
AFFINE = ({}, {"bias": False, "eps": 1e-3}, {"affine": False})
MOMENTA = ({"momentum": 0.1}, {"momentum": 0.3}, {"momentum": None})
UNTRACKED = {"track_running_stats": False, "momentum": 0.1}  # momentum has nothing to weigh
TRACKING = (*({"track_running_stats": True, **momentum} for momentum in MOMENTA), UNTRACKED)


def differentiated(options: dict[str, object]) -> bool:
    """Whether to compare gradients: momentum has no part in them, and compiling them costs."""
    return options["momentum"] == 0.1


BATCH_NORM = dict(
    zip(
        SPACE,
        (torch.nn.BatchNorm1d, torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d),
        strict=True,
    )
)
INSTANCE_NORM = dict(
    zip(
        WITH_SPACE,
        (torch.nn.InstanceNorm1d, torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d),
        strict=True,
    )
)


def product(*choices: tuple[dict[str, object], ...]) -> Iterator[dict[str, object]]:
    """All combinations of one of each."""
    for chosen in itertools.product(*choices):
        yield {name: value for part in chosen for name, value in part.items()}


def some_or_all(
    affine: tuple[dict[str, object], ...], others: Sequence[object], rows: int
) -> Iterator[tuple[dict[str, object], object]]:
    """Every pair in a batch of 5; else each affine form with one of the others, in turn."""
    if rows == 5:
        return itertools.product(affine, others)
    return zip(affine, itertools.islice(itertools.cycle(others), rows % 3, None), strict=False)


def by_channel(x: np.ndarray) -> list[np.ndarray]:
    return list(np.moveaxis(x, -1, 0))


def by_sample(groups: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    return lambda x: [part for sample in x for part in np.split(sample, groups, axis=-1)]


class Chunked(torch.nn.BatchNorm2d):
    """Batch normalisation of one chunk after the other, as arXiv:1705.08741 has it."""

    def __init__(self, num_features: int, size: int, **options: object) -> None:
        super().__init__(num_features, **options)
        self.size = size

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any rank will do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        chunks = torch.chunk(x, max(math.ceil(len(x) / self.size), 1))
        return torch.cat([super(Chunked, self).forward(chunk) for chunk in chunks])


def batch_norms(rank: str, ours: Callable[..., nnx.Module] = norms.BatchNorm) -> list[Twin]:
    return [
        twin(
            ours,
            BATCH_NORM[rank],
            C,
            groups=by_channel,
            differentiated=differentiated(options),
            **options,
        )
        for options in product(AFFINE, TRACKING)
    ]


@pytest.mark.parametrize("rank", SPACE)
def test_batch_norm_is_torchs(rank: str) -> None:
    with jax.enable_x64(True):
        for rows in BATCHES:
            assert check(batch_norms(rank), rows, *SPACE[rank], C) == []


@pytest.mark.parametrize("rank", ["(N, C)", "(N, H, W, C)"])
def test_ghost_batch_norm_is_batch_norm_of_torchs_chunks(rank: str) -> None:
    """5 rows at 2 leave one alone: refused without space. 33 at 32 are 17 + 16."""

    def chunks(size: int) -> Callable[[np.ndarray], list[np.ndarray]]:
        def groups(x: np.ndarray) -> list[np.ndarray]:
            parts = torch.chunk(torch.tensor(x), max(math.ceil(len(x) / size), 1))
            return [channel for part in parts for channel in by_channel(part.numpy())]

        return groups

    with jax.enable_x64(True):
        for rows, size in ((0, 2), (5, 2), (5, 3), (5, 8), (33, 32)):
            every = product(AFFINE, MOMENTA) if size == 3 else AFFINE
            cases = [
                twin(norms.GhostBatchNorm, Chunked, C, size, groups=chunks(size), **options)
                for options in every
            ]
            assert check(cases, rows, *SPACE[rank], C) == []


@pytest.mark.parametrize("rank", INSTANCE_NORM)
def test_instance_norm_is_torchs(rank: str) -> None:
    """But for an empty batch, on which torch's statistics become NaN (test_norms_edges)."""
    affine = ({"affine": True}, {"affine": True, "bias": False, "eps": 1e-3}, {})
    with jax.enable_x64(True):
        for rows in BATCHES[1:]:
            cases = [
                twin(
                    norms.InstanceNorm,
                    INSTANCE_NORM[rank],
                    C,
                    groups=by_sample(C),
                    differentiated=differentiated(options),
                    **options,
                )
                for options in product(affine, TRACKING)
            ]
            assert check(cases, rows, *SPACE[rank], C) == []


@pytest.mark.parametrize("rank", SPACE)
def test_group_norm_is_torchs(rank: str) -> None:
    with jax.enable_x64(True):
        for rows in BATCHES:
            cases = [
                twin(norms.GroupNorm, torch.nn.GroupNorm, n, C, groups=by_sample(n), **options)
                for options, n in some_or_all(AFFINE, (1, 2, C), rows)
            ]
            assert check(cases, rows, *SPACE[rank], C) == []


@pytest.mark.parametrize("rank", SPACE)
def test_layer_norm_is_torchs(rank: str) -> None:
    """Over the last axis, the last two, and all but the batch."""
    affine = ({}, {"bias": False, "eps": 1e-3}, {"elementwise_affine": False})
    full = (*SPACE[rank], C)
    tails = sorted({full[-n:] for n in (1, 2, len(full))})
    with jax.enable_x64(True):
        for rows in BATCHES:
            cases = [
                twin(norms.LayerNorm, torch.nn.LayerNorm, shape, image=False, **options,
                     groups=lambda x, shape=shape: list(x.reshape(-1, *shape)))
                for options, shape in some_or_all(affine, tails, rows)
            ]  # fmt: skip
            assert check(cases, rows, *full) == []


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_is_torchs(eps: float | None) -> None:
    """Half the input is small enough for the default eps to show: float64's 2.2e-16."""
    x = values(5, 3, C) * np.array([1, 1, 1e-8, 1, 1])[:, None, None]
    scale = values(3, C, seed=2)
    for shape in ((C,), (3, C)):
        for gamma in ([], [scale[-shape[0] :] if len(shape) == 2 else scale[0]]):
            assert_twins(
                lambda x, *g, n=shape: functional.rms_norm(x, n, *g, eps=eps),
                lambda x, *g, n=shape: torch.nn.functional.rms_norm(x, n, *g, eps=eps),
                x,
                *gamma,
            )


class Faulty(norms.BatchNorm):
    """Batch normalisation with one fault that its name tells."""

    def __init__(self, fault: str, num_features: int, **options: object) -> None:
        options |= {"momentum": {"momentum": 0.1 + 1e-11, "old value": 0.9}.get(fault, 0.1)}
        super().__init__(num_features, **options)
        self.fault = fault
        self.eps += 1e-10 * (fault == "eps")

    def __call__(self, x: jax.Array, **options: object) -> jax.Array:
        before = None if self.var is None else self.var[...]
        if self.fault == "no gradient through the statistics":
            y = super().__call__(jax.lax.stop_gradient(x), **options)
            slope = self.scale[...] / jnp.sqrt(x.var(tuple(range(x.ndim - 1))) + self.eps)
            y = y + (x - jax.lax.stop_gradient(x)) * slope.reshape((1,) * (x.ndim - 1) + (C,))
        else:
            y = super().__call__(x, **options)
        if self.use_running_average:
            return y * (1 + 1e-10) if self.fault == "evaluation" else y
        if self.fault == "biased":
            rows = x.size // C
            gain = 0.1 * x.var(tuple(range(x.ndim - 1)))
            self.var[...] = self.var[...] - gain * (rows / (rows - 1) - 1)
        if self.fault == "no count":
            self.count[...] = self.count[...] - 1
        if self.fault == "late":
            last = jnp.asarray(self.count[...] == 10, before.dtype)
            self.mean[...] = self.mean[...] * (1 + 1e-10 * last)
        return y


CAUGHT = {
    "none": set(),
    "eps": {"output", "grad input", "grad weight", "evaluation"},
    "momentum": {"running_mean", "running_var", "evaluation"},
    "old value": {"running_mean", "running_var", "evaluation"},
    "biased": {"running_var", "evaluation"},
    "no count": {"num_batches_tracked"},
    "late": {"running_mean", "evaluation"},
    "evaluation": {"evaluation"},
    "no gradient through the statistics": {"grad input"},
}


def test_the_grid_catches_each_fault_where_it_is() -> None:
    with jax.enable_x64(True):
        cases = [
            twin(lambda c, f=fault, **o: Faulty(f, c, **o), torch.nn.BatchNorm2d, C,
                 groups=by_channel)._replace(name=fault)
            for fault in CAUGHT
        ]  # fmt: skip
        found = {fault: set() for fault in CAUGHT}
        for words in check(cases, 5, 2, 3, C):
            fault, quantity, *_ = re.split(r" \(5, 2, 3, 4\): |: error", words)
            found[fault].add(quantity)
    assert found == CAUGHT


def test_the_grid_notices_a_layer_that_takes_what_torch_refuses() -> None:
    class Lenient(norms.BatchNorm):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with jax.enable_x64(True):
        case = twin(Lenient, torch.nn.BatchNorm1d, C, groups=by_channel)
        assert check([case], 1, C) == ["(4,) {} takes (1, 4)"]
