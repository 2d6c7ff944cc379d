"""Max pooling, forward and backward: flaxstab against flax.nnx, interleaved in one run."""

import statistics
import time
from collections.abc import Callable

import jax
from flax import nnx

from flaxstab import functional

ROUNDS = 25
CASES = {  # shape, window, stride
    "2x2, 32x32x32x32": ((32, 32, 32, 32), 2, 2),
    "3x3 stride 2, 8x56x56x64": ((8, 56, 56, 64), 3, 2),
}


def forward_and_backward(pool: Callable[[jax.Array], jax.Array]) -> Callable[..., object]:
    """Returns a jitted function that pools and pulls a cotangent back."""

    @jax.jit
    def run(x: jax.Array, cotangent: jax.Array) -> object:
        y, pullback = jax.vjp(pool, x)
        return y, pullback(cotangent)

    return run


def main() -> None:
    """Prints the ratio of median times."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, median of {ROUNDS} rounds")
    for name, (shape, window, stride) in CASES.items():
        runs = {
            "flaxstab": forward_and_backward(
                lambda x, w=window, s=stride: functional.max_pool(x, w, s)
            ),
            "flax.nnx": forward_and_backward(
                lambda x, w=window, s=stride: nnx.max_pool(x, (w, w), (s, s))
            ),
        }
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], shape)
        cotangent = jax.random.normal(keys[1], functional.max_pool(x, window, stride).shape)
        times: dict[str, list[float]] = {side: [] for side in runs}
        for run in runs.values():
            jax.block_until_ready(run(x, cotangent))
        for _ in range(ROUNDS):
            for side, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(x, cotangent))
                times[side].append(time.perf_counter() - start)
        ratio = statistics.median(times["flax.nnx"]) / statistics.median(times["flaxstab"])
        print(f"{name:26s} flax.nnx takes {ratio:.1f} times as long")


if __name__ == "__main__":
    main()
