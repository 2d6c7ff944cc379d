"""One optimizer step: what flaxstab's moves, launches and takes beside optax's and PyTorch's.

Every peer updates the same float32 parameters in place (JAX: donated). All peers of a case are
timed in turn, round after round in a new order, and each median is given as a ratio to flaxstab's:
above 1, the peer takes longer. Bytes accessed, fusions and temporaries are what XLA says of its
program; PyTorch says nothing of the kind. "flattened" is ``optax.flatten``, which makes one vector
of all parameters; its bytes are over-counted, since XLA charges every slice the whole vector.
"""

import argparse
import datetime
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its share of a GPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from flaxstab import optim

SIZES = ("300x1000", "300x10000", "300x100000", "1x10000000")  # leaves x parameters in each
QUICK = ("6x100",)
RATE, DECAY, MOMENTUM, MAX_NORM = 1e-3, 1e-2, 0.9, 1.0
PAUSE = 0.005  # seconds; PyTorch's idle threads hold their cores for about one millisecond
Tensors = list[torch.Tensor]
Step = Callable[[], object]
Figures = dict[str, float]


class Peer(NamedTuple):
    """One way to take a step.

    Attributes:
      name: the package and the choice made in it.
      step: takes one and waits for it.
      params: the parameters as they are now, one after the other.
      figures: what was counted rather than timed.
    """

    name: str
    step: Step
    params: Callable[[], list[np.ndarray]]
    figures: Figures


def arrays(leaves: int, size: int, seed: int) -> list[np.ndarray]:
    """Draws parameters or gradients."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size, np.float32) for _ in range(leaves)]


def decays(leaves: int) -> list[bool]:
    """Says which leaves decay: every other one, as kernels and biases alternate."""
    return [i % 2 == 0 for i in range(leaves)]


def jax_peer(name: str, tx: optax.GradientTransformation, leaves: int, size: int) -> Peer:
    """Compiles a step with an optax transformation."""
    params, gradients = ([jnp.asarray(a) for a in arrays(leaves, size, seed)] for seed in (0, 1))
    state = tx.init(params)

    def step(params: object, state: object, gradients: object) -> tuple[object, object]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jax.clear_caches()
    start = time.process_time()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()
    seconds = time.process_time() - start
    carried = [params, state]

    def run() -> None:
        carried[:] = compiled(*carried, gradients)
        jax.block_until_ready(carried)

    count = leaves * size
    figures = {
        "bytes_per_parameter": compiled.cost_analysis()["bytes accessed"] / count,
        "fusions_per_leaf": len(re.findall(r" fusion\(", compiled.as_text())) / leaves,
        "temporaries_per_parameter": compiled.memory_analysis().temp_size_in_bytes / count,
        "compile_cpu_seconds": seconds,
    }
    return Peer(name, run, lambda: [np.asarray(a) for a in carried[0]], figures)


def torch_peer(
    name: str,
    make: Callable[[Sequence[object]], torch.optim.Optimizer],
    leaves: int,
    size: int,
    before: Callable[[Tensors], object] = lambda _: None,
) -> Peer:
    """Prepares a step with a torch optimizer."""
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    params = [torch.tensor(a, device=device, requires_grad=True) for a in arrays(leaves, size, 0)]
    gradients = [torch.tensor(a, device=device) for a in arrays(leaves, size, 1)]
    decaying = [p for p, flag in zip(params, decays(leaves), strict=True) if flag]
    others = [p for p, flag in zip(params, decays(leaves), strict=True) if not flag]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    optimizer = make([group for group in groups if group["params"]])

    def run() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        before(params)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Peer(name, run, lambda: [p.detach().cpu().numpy() for p in params], {})


def adamw(leaves: int, size: int) -> list[Callable[[], Peer]]:
    """AdamW whose decay is masked."""
    mask = decays(leaves)
    ours = optim.adamw(RATE, weight_decay=DECAY, mask=mask)
    make = partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)
    return [
        partial(jax_peer, "flaxstab", ours, leaves, size),
        partial(
            jax_peer, "optax", optax.adamw(RATE, weight_decay=DECAY, mask=mask), leaves, size
        ),
        partial(torch_peer, "torch foreach", partial(make, foreach=True), leaves, size),
        partial(torch_peer, "torch fused", partial(make, fused=True), leaves, size),
    ]  # fmt: skip


def adam(leaves: int, size: int) -> list[Callable[[], Peer]]:
    """Adam without decay, also on one vector of all parameters."""
    make = partial(torch.optim.Adam, lr=RATE)
    return [
        partial(jax_peer, "flaxstab", optim.adam(RATE), leaves, size),
        partial(jax_peer, "optax", optax.adam(RATE), leaves, size),
        partial(jax_peer, "flaxstab flattened", optax.flatten(optim.adam(RATE)), leaves, size),
        partial(torch_peer, "torch foreach", partial(make, foreach=True), leaves, size),
        partial(torch_peer, "torch fused", partial(make, fused=True), leaves, size),
    ]


def sgd(leaves: int, size: int) -> list[Callable[[], Peer]]:
    """Gradient descent with momentum."""
    make = partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM)
    return [
        partial(jax_peer, "flaxstab", optim.sgd(RATE, MOMENTUM), leaves, size),
        partial(jax_peer, "optax", optax.sgd(RATE, MOMENTUM), leaves, size),
        partial(torch_peer, "torch foreach", partial(make, foreach=True), leaves, size),
        partial(torch_peer, "torch fused", partial(make, fused=True), leaves, size),
    ]


def clipped(leaves: int, size: int) -> list[Callable[[], Peer]]:
    """AdamW behind clipping by the total norm."""
    mask = decays(leaves)
    ours = optim.adamw(RATE, weight_decay=DECAY, mask=mask)
    theirs = optax.adamw(RATE, weight_decay=DECAY, mask=mask)
    clip = partial(torch.nn.utils.clip_grad_norm_, max_norm=MAX_NORM)
    make = partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY, foreach=True)
    return [
        partial(
            jax_peer, "flaxstab", optax.chain(optim.clip_grad_norm(MAX_NORM), ours), leaves, size
        ),
        partial(
            jax_peer, "optax", optax.chain(optax.clip_by_global_norm(MAX_NORM), theirs),
            leaves, size,
        ),
        partial(torch_peer, "torch foreach", make, leaves, size, clip),
    ]  # fmt: skip


CASES = {"adamw": adamw, "adam": adam, "sgd": sgd, "clipped adamw": clipped}


def timed(peers: Sequence[Peer], rounds: int) -> dict[str, float]:
    """Returns each peer's median seconds, all in a new order in every round."""
    taken: dict[str, list[float]] = {peer.name: [] for peer in peers}
    order, shuffle = list(peers), random.Random(0).shuffle  # noqa: S311
    for number in range(-1, rounds):  # the first one warms up
        shuffle(order)
        for peer in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            peer.step()
            if number >= 0:
                taken[peer.name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


COLUMNS = ("case", "leaves", "peer", "bytes_per_parameter", "fusions_per_leaf",
           "temporaries_per_parameter", "compile_cpu_seconds", "ms", "ratio")  # fmt: skip
TITLES = ("case", "leaves", "peer", "B/param", "fusions/leaf", "temp B/param", "compile s", "ms",
          "ratio")  # fmt: skip


def rows(case: str, leaves: int, size: int, rounds: int) -> list[dict[str, object]]:
    """Returns a case's rows of the table; a peer that cannot be had is left out with the reason."""
    peers, left_out = [], []
    for make in CASES[case](leaves, size):
        try:
            peers.append(make())
        except RuntimeError as reason:
            left_out.append({"peer": make.args[0], "reason": str(reason).partition("\n")[0]})
    taken = timed(peers, rounds)
    head = {"case": case, "leaves": f"{leaves}x{size}"}
    found = [
        {
            **head, "peer": peer.name, **peer.figures,
            "ms": 1e3 * taken[peer.name], "ratio": taken[peer.name] / taken["flaxstab"],
        }
        for peer in peers
    ]  # fmt: skip
    return found + [{**head, **one} for one in left_out]


def line(row: dict[str, object]) -> str:
    """Returns a row of the printed table, in Markdown."""
    if "reason" in row:
        return f"| {row['case']} | {row['leaves']} | {row['peer']} | left out: {row['reason']} |"
    cells = [row.get(column, "-") for column in COLUMNS]
    return "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table as it grows and writes all figures if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="as 300x1000")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--quick", action="store_true", help="tiny, 2 rounds: a test")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.sizes, chosen.rounds = list(QUICK), 2
    packages = ("jax", "optax", "torch")
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "rounds": chosen.rounds,
        "versions": {package: metadata.version(package) for package in packages},
    }
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    print("| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES), sep="\n")
    table: list[dict[str, object]] = []
    for case in chosen.cases:
        for text in chosen.sizes:
            leaves, size = map(int, text.split("x"))
            table += (found := rows(case, leaves, size, chosen.rounds))
            print(*map(line, found), sep="\n", flush=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({**about, "rows": table}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
