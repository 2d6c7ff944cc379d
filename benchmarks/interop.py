"""Weights from a file into a model, as a ratio to reading that file; interleaved in one run.

``read`` is the floor: the file's bytes, from the page cache. PyTorch does the same with
``safetensors.torch.load_file`` and ``load_state_dict`` into a float32 twin, which copies without
turning a kernel.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import safetensors.torch
import torch
from flax import nnx

from flaxstab import interop, models

ROUNDS = 15


class Twin(torch.nn.Module):
    """Buffers by the names of a state_dict: what PyTorch's ``load_state_dict`` fills."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *owners, last = name.split(".")
            module: torch.nn.Module = self
            for owner in owners:
                if owner not in module._modules:
                    module.add_module(owner, torch.nn.Module())
                module = module.get_submodule(owner)
            module.register_buffer(last, torch.zeros_like(tensor))


def peers(model: nnx.Module, path: Path) -> dict[str, Callable[[], object]]:
    """Returns what is timed, by name; the first is the floor."""
    tensors = interop.read_tensors(path)
    twin = Twin(safetensors.torch.load_file(path))

    def load() -> None:
        interop.load_safetensors(model, path)
        jax.block_until_ready(nnx.state(model, nnx.Not(nnx.RngState)))

    def move() -> None:
        interop.load_state_dict(model, tensors)
        jax.block_until_ready(nnx.state(model, nnx.Not(nnx.RngState)))

    return {
        "read the bytes": path.read_bytes,
        "interop.read_tensors": lambda: interop.read_tensors(path),
        "interop.load_safetensors": load,
        "interop.load_state_dict, of arrays in memory": move,
        "interop.save_safetensors": lambda: interop.save_safetensors(
            model, path.with_name("again.safetensors")
        ),
        "PyTorch: load_file and load_state_dict": lambda: twin.load_state_dict(
            safetensors.torch.load_file(path)
        ),
    }


def medians(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median time of each in seconds, all of them in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(-1, rounds):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            if i >= 0:  # one round to warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints each median time and its ratio to reading the file; returns the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet152", help="of flaxstab.models")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    model = getattr(models, given.model)(rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        path = interop.save_safetensors(model, Path(folder) / "model.safetensors")
        size = path.stat().st_size
        found = medians(peers(model, path), given.rounds)
    floor, *_ = found.values()
    print(f"{given.model}, {size / 1e6:.0f} MB, median of {given.rounds} rounds")
    for name, seconds in found.items():
        print(f"{name:46s} {seconds * 1e3:8.1f} ms  {seconds / floor:5.2f} times reading it")
    return {name: seconds / floor for name, seconds in found.items()}


if __name__ == "__main__":
    main()
