"""Residual blocks: bytes kept for the backward pass and time, beside flax.nnx's parts and PyTorch.

N is the bytes of the block's input. Kept is what the backward pass holds in training with running
statistics, parameters excluded. Times are medians over flaxstab's, above 1 the peer takes longer;
all peers of a case are timed in turn, in a new order in every round. A second table runs a ResNet's
equal blocks by a loop (`scan=True`) beside the same blocks unrolled: time, compilation, length of
the program.
"""

import argparse
import datetime
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its share of a GPU

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from norm_peers import Peer, torch_kept
from norms import QUEUED, optional, timed, versions

from flaxstab import blocks, models
from parity_tests.support.kept import kept_bytes
from parity_tests.support.stock_blocks import StockBlock

GROUPS = 32
SHAPE, QUICK = (32, 32, 32, 64), (2, 4, 4, 32)
LINE = "{:9s} {:9s} {:20s} {:>6s} {:>7s} {:>7s} {:>8s}"
DEPTH, WIDTH, SCANNED = 8, 16, (32, 16, 16, 3)


def ours(block: str, channels: int, dtype: str) -> nnx.Module:
    """Returns flaxstab's block."""
    make = {
        "basic": blocks.BasicBlock,
        "preact": partial(blocks.PreActResBlock, groups=GROUPS),
    }[block]
    return make(channels, channels, dtype=dtype, rngs=nnx.Rngs(0))


def stock(block: str, channels: int, dtype: str) -> nnx.Module:
    """Returns the same of flax.nnx's parts."""
    norm = {"basic": nnx.BatchNorm, "preact": partial(nnx.GroupNorm, num_groups=GROUPS)}[block]
    return StockBlock(channels, norm, block == "preact", dtype, nnx.Rngs(0))


def program(
    module: nnx.Module,
) -> tuple[Callable[..., tuple[jax.Array, object]], nnx.State, nnx.State]:
    """Returns a training forward pass as a function of input, parameters and the rest, and both."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(x: jax.Array, params: nnx.State, rest: nnx.State) -> tuple[jax.Array, object]:
        own = nnx.merge(graph, params, rest, copy=True)
        y = own(x)
        return y, jax.lax.stop_gradient(nnx.state(own, nnx.BatchStat))

    return forward, params, rest


def gradients(forward: Callable[..., tuple[jax.Array, object]]) -> Callable[..., object]:
    """Returns output, statistics and the gradients for input and parameters."""

    def both(cotangent: jax.Array, x: jax.Array, params: nnx.State, rest: nnx.State) -> object:
        y, pullback, moved = jax.vjp(lambda x, p: forward(x, p, rest), x, params, has_aux=True)
        return y, moved, pullback(cotangent)

    return both


def jax_peer(name: str, module: nnx.Module, x: np.ndarray, dtype: str) -> Peer:
    """Compiles a block and its gradients."""
    forward, params, rest = program(module)
    array = jnp.array(x, dtype)
    compiled = jax.jit(forward).lower(array, params, rest).compile()
    both = jax.jit(gradients(forward)).lower(array, array, params, rest).compile()
    held = jax.tree.leaves((params, nnx.filter_state(rest, nnx.BatchStat)))
    kept = kept_bytes(forward, array, params, rest, parameters=held) / array.nbytes
    return Peer(
        name,
        partial(compiled, array, params, rest),
        partial(both, array, array, params, rest),
        jax.block_until_ready,
        {"kept": kept},
    )


def torch_peer(torch: ModuleType, block: str, layout: str, x: np.ndarray, dtype: str) -> Peer:
    """Prepares PyTorch's block, which has the parameters' dtype throughout."""
    from torch_ref import blocks as theirs

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    channels, kind = x.shape[-1], getattr(torch, dtype)
    make = {"basic": theirs.BasicBlock, "preact": partial(theirs.PreActResBlock, groups=GROUPS)}
    module = make[block](channels, channels).to(device, kind, memory_format=form)
    given = torch.tensor(x, device=device).to(kind).movedim(-1, 1).contiguous(memory_format=form)
    given.requires_grad_()
    parameters = list(module.parameters())

    def forward() -> object:
        with torch.no_grad():
            return module(given)

    def both() -> object:
        y = module(given)
        return y, torch.autograd.grad(y, (given, *parameters), given.detach())

    def call(x: object, *_: object) -> object:
        return module(x)

    held = [*parameters, *module.buffers()]
    kept = torch_kept(torch, call, given, held) / (given.numel() * given.element_size())
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    return Peer(f"torch {layout}", forward, both, lambda _: wait(), {"kept": kept})


def peers_of(
    block: str, dtype: str, shape: tuple[int, ...], torch: ModuleType | None
) -> list[Peer]:
    """Returns all ways to compute a block."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    found = [jax_peer("flaxstab", ours(block, shape[-1], dtype), x, dtype),
             jax_peer("nnx", stock(block, shape[-1], dtype), x, dtype)]  # fmt: skip
    layouts = () if torch is None else ("NCHW", "channels_last")
    return found + [torch_peer(torch, block, layout, x, dtype) for layout in layouts]


Scanned = dict[str, dict[str, float]]


def scanned(depth: int, shape: tuple[int, ...], rounds: int) -> Scanned:
    """Returns figures of one stage of equal blocks, unrolled and run by a loop."""
    size = models.ResNetSize(block="basic", layers=(depth,), width=WIDTH)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    cotangent, counted, peers = jnp.ones((shape[0], 10)), {}, []
    for name, scan in (("flaxstab", False), ("scan", True)):
        model = models.ResNet(size, 10, stem="cifar", scan=scan, rngs=nnx.Rngs(0))
        forward, params, rest = program(model)
        start = time.perf_counter()
        lowered = jax.jit(gradients(forward)).lower(cotangent, x, params, rest)
        both = lowered.compile()
        counted[name] = {
            "compile_s": time.perf_counter() - start,
            "lines": float(len(lowered.as_text().splitlines())),
        }
        compiled = jax.jit(forward).lower(x, params, rest).compile()
        peers.append(Peer(name, partial(compiled, x, params, rest),
                          partial(both, cotangent, x, params, rest), jax.block_until_ready,
                          {}))  # fmt: skip
    times = timed(peers, rounds, 1)
    return {name: counted[name] | times[name] for name in counted}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, 2 rounds: a test")
    chosen = parser.parse_args(arguments)
    torch, no_torch = optional("torch")
    shape, rounds = (QUICK, 2) if chosen.quick else (SHAPE, chosen.rounds)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(date, jax.devices()[0].device_kind, f"{os.cpu_count()} cores", versions(), no_torch)
    print("--quick: the times are noise." if chosen.quick else f"{rounds} rounds, N={shape}")
    print(LINE.format("block", "dtype", "peer", "kept", "fwd", "fwd+bwd", "ms"))
    queued = QUEUED if jax.default_backend() == "gpu" else 1
    for block in ("basic", "preact"):
        for dtype in chosen.dtypes:
            found = timed(peers_of(block, dtype, shape, torch), rounds, queued)
            for name, row in found.items():
                cells = (row["kept"], row["forward_ratio"], row["forward_backward_ratio"],
                         row["forward_backward_ms"])  # fmt: skip
                print(LINE.format(block, dtype, name, *(f"{cell:.2f}" for cell in cells)))
    print(
        f"\n{'blocks':7s} {'how':9s} {'fwd':>6s} {'fwd+bwd':>8s} {'compile, s':>11s} {'lines':>6s}"
    )
    depth, images = (2, (2, 4, 4, 3)) if chosen.quick else (DEPTH, SCANNED)
    for name, row in scanned(depth, images, rounds).items():
        how = "unrolled" if name == "flaxstab" else name
        ratios = f"{row['forward_ratio']:6.2f} {row['forward_backward_ratio']:8.2f}"
        print(f"{depth:<7d} {how:9s} {ratios} {row['compile_s']:11.1f} {row['lines']:6.0f}")


if __name__ == "__main__":
    main()
