"""What importing costs: flaxstab's modules against flax.nnx, interleaved, in fresh processes."""

import statistics
import subprocess
import sys
import time

ROUNDS = 9
MODULES = ("flax.nnx", "flaxstab", "flaxstab.norms", "flaxstab.optim", "flaxstab.parity")


def seconds(module: str) -> float:
    """Returns how long a fresh interpreter takes to import a module, start-up included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)  # noqa: S603
    return time.perf_counter() - start


def main() -> None:
    """Prints the median time of each module as a ratio to flax.nnx."""
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for _ in range(ROUNDS):
        for module in MODULES:
            times[module].append(seconds(module))
    base = statistics.median(times["flax.nnx"])
    print(f"median of {ROUNDS} interleaved rounds, as a ratio to flax.nnx")
    for module, taken in times.items():
        print(f"{module:18s} {statistics.median(taken) / base:.2f}")


if __name__ == "__main__":
    main()
