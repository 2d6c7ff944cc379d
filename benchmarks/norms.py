"""Normalisation: what flaxstab keeps, moves and takes beside flax.nnx, equinox and PyTorch.

All peers of one case are timed in turn, round after round, and each median is given as a ratio to
flaxstab's: above 1, the peer takes longer. Bytes are in N, those of the input. A peer gets the
layout and the dtype of parameters it prefers, running statistics are left out, and a peer that
cannot be had is named with the reason.

On a GPU a timing is that of many calls queued one behind the other, so that Python runs ahead of
the device; inputs that its cache cannot hold are also measured against a copy in the same run.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its share of a GPU

import jax
import jax.numpy as jnp
import numpy as np
from norm_peers import IMAGE_NORMS, Case, Figures, Peer, makers

FLOORS = {"LayerNorm": 5, "RMSNorm": 5, "BatchNorm": 8, "GroupNorm": 5, "InstanceNorm": 5}  # in N
PACKAGES = ("jax", "jaxlib", "flax", "equinox", "torch")
SIZES = {  # of rows (N, C) and of images (N, H, W, C)
    "cpu": (["8192x768", "512x4096"], ["32x32x32x64", "8x56x56x256"]),
    "gpu": (["65536x1024", "16384x4096"], ["512x32x32x128", "64x56x56x256"]),
}
QUICK = (["8x64"], ["2x4x4x64"])
BEYOND_CACHE = 100_000_000  # bytes, twice the second-level cache of an H100 or H200
COPIED = 2**28  # float32 values
QUEUED = 20  # calls behind each other in one timing on a GPU
LEGEND = (
    "kept (for the backward pass), temp (compiled temporaries), bytes (accessed): in units of the "
    "input's bytes;\nfwd, fwd+bwd: time over flaxstab's, above 1 the peer takes longer; of copy: "
    "the share of a copy's bandwidth (GPU)."
)
PAUSE = 0.005  # seconds; PyTorch's idle threads hold their cores for about one millisecond


def make_case(norm: str, dtype: str, shape: tuple[int, ...]) -> Case:
    """Draws a case from a fixed seed."""
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal(shape, np.float32) for _ in range(2))
    parameters = 1 if norm == "RMSNorm" else 2
    affine = [rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32) for _ in range(parameters)]
    return Case(norm, dtype, x, cotangent, tuple(affine))


def optional(name: str) -> tuple[ModuleType | None, str]:
    """Imports a package, or returns why it takes no part."""
    try:
        module = importlib.import_module(name)
    except ImportError as reason:
        return None, f"{name}: {reason}"
    backend = jax.default_backend()
    if name == "torch" and backend not in ("cpu", "gpu" if module.cuda.is_available() else "cpu"):
        return None, f"torch: cannot use the device of JAX, {backend}"
    return module, ""


def seconds(run: Callable[[], object], wait: Callable[[object], object], queued: int) -> float:
    """Returns the time of a call, of several queued behind each other."""
    start = time.perf_counter()
    for _ in range(queued):
        result = run()
    wait(result)
    return (time.perf_counter() - start) / queued


def timed(peers: Sequence[Peer], rounds: int, queued: int) -> dict[str, Figures]:
    """Returns each peer's figures with its median times, all in a new order in every round."""
    taken: dict[tuple[str, str], list[float]] = {}
    runs = [(p, "forward", p.forward) for p in peers]
    runs += [(p, "forward_backward", p.both) for p in peers]
    # In one order a peer would always find the caches as the same other peer left them.
    shuffle = random.Random(0).shuffle  # noqa: S311
    for number in range(-1, rounds):  # the first one warms up
        shuffle(runs)
        for peer, what, run in runs:
            time.sleep(PAUSE)
            time_taken = seconds(run, peer.wait, queued)
            if number >= 0:
                taken.setdefault((peer.name, what), []).append(time_taken)
    result = {}
    for peer in peers:
        figures = dict(peer.figures)
        for what in ("forward", "forward_backward"):
            own, base = (statistics.median(taken[who, what]) for who in (peer.name, "flaxstab"))
            figures |= {f"{what}_ms": own * 1e3, f"{what}_ratio": own / base}
        result[peer.name] = figures
    return result


def copy_bandwidth(rounds: int) -> float:
    """Returns bytes read and written per second by a copy of a large array."""
    x = jnp.ones(COPIED, jnp.float32)
    copy = partial(jax.jit(jnp.copy), x)
    jax.block_until_ready(copy())
    times = [seconds(copy, jax.block_until_ready, QUEUED) for _ in range(rounds)]
    return 2 * x.nbytes / statistics.median(times)


def rows(case: Case, found: dict[str, Figures], bandwidth: float | None) -> list[dict[str, object]]:
    """Returns a case's rows of the table, with the share of the copy's bandwidth if known."""
    size = case.x.size * jnp.dtype(case.dtype).itemsize
    head = {"norm": case.norm, "dtype": case.dtype, "shape": list(case.x.shape)}
    result: list[dict[str, object]] = []
    for name, figures in found.items():
        row = {**head, "input_bytes": size, "peer": name, **figures}
        if bandwidth is not None and size >= BEYOND_CACHE:
            achieved = FLOORS[case.norm] * size / (figures["forward_backward_ms"] / 1e3)
            row["of_copy_bandwidth"] = achieved / bandwidth
        result.append(row)
    return result


COLUMNS = ("norm", "dtype", "shape", "peer", "kept", "temporaries", "bytes_accessed", "fusions",
           "forward_ratio", "forward_backward_ratio", "of_copy_bandwidth")  # fmt: skip
TITLES = ("norm", "dtype", "shape", "peer", "kept", "temp", "bytes", "fusions", "fwd", "fwd+bwd",
          "of copy")  # fmt: skip
LINE = "{:13s} {:9s} {:14s} {:27s} {:>6s} {:>6s} {:>7s} {:>7s} {:>6s} {:>7s} {:>7s}"


def line(row: dict[str, object]) -> str:
    """Returns a row of the printed table; a program with loops moves at least the bytes given."""
    cells = []
    for column in COLUMNS:
        value = row.get(column, "-")
        if isinstance(value, list):
            value = "x".join(map(str, value))
        cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
    if row.get("loops"):
        cells[COLUMNS.index("bytes_accessed")] = ">" + cells[COLUMNS.index("bytes_accessed")]
    return LINE.format(*cells)


def versions() -> dict[str, str | None]:
    """Returns the packages' versions, ``None`` for an absent one."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__ or ''}\n{LEGEND}", formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = SIZES["gpu" if jax.default_backend() == "gpu" else "cpu"]
    parser.add_argument("--norms", nargs="+", choices=FLOORS, default=list(FLOORS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="*", default=sizes[0], help="(N, C), as 8192x768")
    parser.add_argument("--images", nargs="*", default=sizes[1], help="(N, H, W, C)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, 2 rounds: a test")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rows, chosen.images, chosen.rounds = *QUICK, 2
    return chosen


def cases(chosen: argparse.Namespace) -> Iterator[Case]:
    """Yields what the command line asks for."""
    for norm in chosen.norms:
        for size in chosen.images if norm in IMAGE_NORMS else chosen.rows:
            for dtype in chosen.dtypes:
                yield make_case(norm, dtype, tuple(map(int, size.split("x"))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table as it grows and writes all figures if asked to."""
    chosen, gpu = options(arguments), jax.default_backend() == "gpu"
    eqx, no_eqx = optional("equinox")
    torch, no_torch = optional("torch")
    left_out = [reason for reason in (no_eqx, no_torch) if reason]
    bandwidth = copy_bandwidth(chosen.rounds) if gpu else None
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": versions(),
        "rounds": chosen.rounds,
        "queued": QUEUED if gpu else 1,
        "copy_bytes_per_second": bandwidth,
    }
    print(*(f"{name}: {value}" for name, value in about.items()), *left_out, sep="\n")
    print(LEGEND, "--quick: the times are noise." if chosen.quick else "", sep="\n")
    print(LINE.format(*TITLES))
    table: list[dict[str, object]] = []
    for case in cases(chosen):
        peers = []
        for name, make in makers(case, eqx, torch, chosen.compile):
            try:
                peers.append(make())
            except Exception as reason:
                if name == "flaxstab":
                    raise
                left_out.append(f"{name}, {case.norm} {case.dtype}: {reason}".partition("\n")[0])
                print(left_out[-1])
        found = rows(case, timed(peers, chosen.rounds, about["queued"]), bandwidth)
        print(*map(line, found), sep="\n", flush=True)
        table += found
    if chosen.json is not None:
        whole = json.dumps({**about, "left_out": left_out, "rows": table}, indent=1)
        unfinished = chosen.json.with_name(f".{chosen.json.name}.partial")
        unfinished.write_text(whole + "\n", encoding="utf-8")
        unfinished.replace(chosen.json)


if __name__ == "__main__":
    main()
