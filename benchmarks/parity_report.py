"""How long it takes to compare ResNet-50 with its PyTorch twin and to write the report.

``python benchmarks/parity_report.py [--size 64] [--batch 2] [--out FOLDER]`` compares, finds the
first layer that differs, writes ``resnet50.json`` and ``resnet50.html``, and prints the seconds of
each part. With ``--fault`` a planted one (eps of one BatchNorm) is looked for.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from flax import nnx

from flaxstab import models, parity
from torch_ref.resnet import ResNet

FAULTY = {"resnet18": "layer3.1.bn2", "resnet50": "layer3.2.bn2"}  # which gets another eps


class Part(NamedTuple):
    """A part of the work.

    Attributes:
      name: what was done.
      seconds: how long it took.
      cpu: how long processors worked on it, which other jobs on the machine hardly change.
    """

    name: str
    seconds: float
    cpu: float


class Clock:
    """Keeps how long parts take."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._last = time.perf_counter(), time.process_time()

    def __call__(self, name: str) -> None:
        """Ends a part, and shows it."""
        now = time.perf_counter(), time.process_time()
        part = Part(name, *(end - start for start, end in zip(self._last, now, strict=True)))
        print(f"{name:40s} {part.seconds:7.1f} s {part.cpu:7.1f} s of CPU", flush=True)
        self.parts.append(part)
        self._last = now


def sides(kind: str, *, fault: bool) -> tuple[nnx.Module, torch.nn.Module]:
    """Returns a ResNet and its twin.

    Args:
      kind: ``'resnet18'`` or ``'resnet50'``.
      fault: whether one BatchNorm of PyTorch's side gets another eps.
    """
    torch.manual_seed(0)
    ours = {"resnet18": models.resnet18, "resnet50": models.resnet50}[kind]
    theirs = {
        "resnet18": ResNet("basic", (2, 2, 2, 2)),
        "resnet50": ResNet("bottleneck", (3, 4, 6, 3)),
    }
    twin = theirs[kind]
    if fault:
        twin.get_submodule(FAULTY[kind]).eps = 1e-4
    return ours(num_classes=1000, rngs=nnx.Rngs(0)), twin


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--model", choices=("resnet18", "resnet50"), default="resnet50")
    parser.add_argument("--fault", action="store_true", help="plant one, and look for it")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the report")
    given = parser.parse_args()
    clock = Clock()
    flax_side, torch_side = sides(given.model, fault=given.fault)
    shape = (given.batch, given.size, given.size, 3)
    images = np.random.default_rng(0).normal(0.5, 1.0, shape).astype(np.float32)
    clock("making both sides")
    report = parity.compare(flax_side, torch_side, images, layout="image")
    clock("comparing, in float64 and float32")
    location = parity.locate(flax_side, torch_side, images, layout="image")
    clock("each layer alone, forward and backward")
    for ending in ("json", "html"):
        title = f"{given.model} beside PyTorch, {given.size} x {given.size}"
        path = given.out / f"{given.model}.{ending}"
        parity.write_report(report, path, title=title, location=location)
    clock("writing the report")
    seconds, cpu = (sum(column) for column in list(zip(*clock.parts, strict=True))[1:])
    print(f"{'together':40s} {seconds:7.1f} s {cpu:7.1f} s of CPU\n\n{report}\n\n{location}")


if __name__ == "__main__":
    main()
