"""Random numbers: flaxstab.torch_rng against PyTorch itself, interleaved in one run.

Also counts how many bits agree, which for the older truncated normals is not all of them.
"""

import statistics
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from flaxstab.torch_rng import Generator

ROUNDS = 15
N = 2_000_000
SMALL = 200_000
SEED = 42

Draw = Callable[[Generator], np.ndarray]
CASES: dict[str, tuple[Draw, Callable[[], Tensor]]] = {
    "2e6 normals": (lambda g: g.normal(N), lambda: torch.empty(N).normal_()),
    "2e6 normals, mean and std": (
        lambda g: g.normal(N, 0.3, 1.7),
        lambda: torch.empty(N).normal_(0.3, 1.7),
    ),
    "2e6 normals, bfloat16": (
        lambda g: g.normal(N, dtype=ml_dtypes.bfloat16),
        lambda: torch.empty(N, dtype=torch.bfloat16).normal_(),
    ),
    "2e6 uniforms": (lambda g: g.uniform(N), lambda: torch.empty(N).uniform_()),
    "2e5 normals, float64": (
        lambda g: g.normal(SMALL, dtype=np.float64),
        lambda: torch.empty(SMALL, dtype=torch.float64).normal_(),
    ),
    "2e6 truncated normals": (
        lambda g: g.trunc_normal(N, std=0.02),
        lambda: torch.nn.init.trunc_normal_(torch.empty(N), std=0.02),
    ),
    "2e5 truncated normals, before 2.12": (
        lambda g: g.trunc_normal(SMALL, stream="inverse"),
        lambda: older_trunc_normal(torch.empty(SMALL)),
    ),
    "2e6 of a dropout mask": (
        lambda g: g.dropout_mask(N, 0.1),
        lambda: torch.empty(N).bernoulli_(0.9) != 0,
    ),
    "permutation of 2e5": (lambda g: g.randperm(SMALL), lambda: torch.randperm(SMALL)),
}


def older_trunc_normal(tensor: Tensor, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Truncated normals around 0 by the inverse error function, of PyTorch's operations."""
    law = statistics.NormalDist(0, std)
    tensor.uniform_(2 * law.cdf(a) - 1, 2 * law.cdf(b) - 1).erfinv_().mul_(std * 2**0.5)
    return tensor.clamp_(a, b)


def measured(ours: Draw, theirs: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Returns both median times in seconds and the share of equal numbers."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        generator = Generator(SEED)
        torch.manual_seed(SEED)
        start = time.perf_counter()
        left = ours(generator)
        middle = time.perf_counter()
        right = theirs()
        end = time.perf_counter()
        times[0].append(middle - start)
        times[1].append(end - middle)
    as_bytes = right.contiguous().view(torch.uint8).numpy().view(f"V{right.element_size()}")
    equal = float(np.mean(left.view(as_bytes.dtype) == as_bytes))
    return statistics.median(times[0]), statistics.median(times[1]), equal


def main() -> None:
    """Prints the ratio of median times and the share of equal numbers."""
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__} ({capability}), median of {ROUNDS} rounds")
    for name, (ours, theirs) in CASES.items():
        left, right, equal = measured(ours, theirs)
        print(
            f"{name:35s} {left * 1e3:7.1f} ms, torch {right * 1e3:6.1f} ms: "
            f"{left / right:4.1f} times as long, {equal:.4%} bit-equal"
        )


if __name__ == "__main__":
    main()
