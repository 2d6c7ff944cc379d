"""A Transformer block of flaxstab, of stock flax.nnx and of PyTorch: bytes kept, and time.

Bytes that the backward pass keeps, parameters apart, in units of the block's input; the compiled
program's temporaries; and the time of forward and backward pass together, interleaved in one run.
Dropout is on: 0.1 on the attention's probabilities, behind the activation and behind the block.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import blocks, functional, models
from parity_tests.support.kept import kept_by_module

BATCH, LENGTH, D, HEADS = 8, 256, 384, 6


class Stock(nnx.Module):
    """The same block of stock pieces, put together as their documentation does."""

    def __init__(self, dtype: str, rngs: nnx.Rngs) -> None:
        options = {"dtype": dtype, "rngs": rngs}
        self.ln1, self.ln2 = (nnx.LayerNorm(D, epsilon=1e-5, **options) for _ in range(2))
        self.attn = nnx.MultiHeadAttention(
            HEADS, D, dropout_rate=0.1, broadcast_dropout=False, decode=False, deterministic=False,
            **options,
        )  # fmt: skip
        self.up, self.down = nnx.Linear(D, 4 * D, **options), nnx.Linear(4 * D, D, **options)
        self.inner, self.outer = (nnx.Dropout(0.1, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, L, D) to (N, L, D)."""
        x = x + self.attn(self.ln1(x))
        h = self.inner(functional.gelu(self.up(self.ln2(x))))
        return x + self.outer(self.down(h))


class Peer(NamedTuple):
    """One implementation: what it keeps, its temporaries, and one run of both passes."""

    kept: float
    temporaries: float
    run: Callable[[], object]


def jax_peer(module: nnx.Module, x: jax.Array) -> Peer:
    """Compiles a module's forward and backward pass, with gradients for input and parameters."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def both(params: nnx.State, rest: nnx.State, x: jax.Array) -> object:
        def loss(params: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
            own = nnx.merge(graph, params, rest, copy=True)
            return jnp.sum(own(x), dtype=jnp.float32), nnx.state(own, nnx.Not(nnx.Param))

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    compiled = jax.jit(both).lower(params, rest, x).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / x.nbytes
    kept = kept_by_module(module, x) / x.nbytes
    return Peer(kept, temporaries, lambda: jax.block_until_ready(compiled(params, rest, x)))


def torch_peer(x: np.ndarray, dtype: str) -> Peer | None:
    """PyTorch's own block of the same document; ``None`` without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    from torch_ref.blocks import TransformerBlock

    module = TransformerBlock(D, HEADS).to(getattr(torch, dtype))
    tensor = torch.tensor(x).to(getattr(torch, dtype)).requires_grad_()
    held = {}

    def pack(saved: object) -> object:
        held[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        _ = module(tensor)
    for parameter in module.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    kept = sum(storage.nbytes() for storage in held.values())

    def run() -> object:
        return torch.autograd.grad(module(tensor).sum(), (tensor, *module.parameters()))

    return Peer(kept / (tensor.numel() * tensor.element_size()), float("nan"), run)


def compare(dtype: str, rounds: int) -> None:
    """Prints a row for each implementation."""
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, D))
    ours = blocks.TransformerBlock(D, HEADS, dtype=dtype, rngs=nnx.Rngs(0))
    stock = Stock(dtype, nnx.Rngs(0))
    peers = {
        "flaxstab": jax_peer(ours, jnp.asarray(x, dtype)),
        "flax.nnx": jax_peer(stock, jnp.asarray(x, dtype)),
        "torch": torch_peer(x, dtype),
    }
    found = {name: peer for name, peer in peers.items() if peer is not None}
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, peer in found.items():
            start = time.perf_counter()
            peer.run()
            if number:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    own = statistics.median(times["flaxstab"])
    for name, peer in found.items():
        ratio = statistics.median(times[name]) / own
        print(f"| {name} | {dtype} | {peer.kept:.2f} | {peer.temporaries:.1f} | {ratio:.2f} |")


def lines(depth: int, *, scan: bool) -> int:
    """Returns how long the lowered program of a language model's gradient is."""
    size = models.LMSize(d=32, depth=depth, nhead=2, max_len=16)
    tokens = jnp.zeros((2, 16), jnp.int32)

    def gradient(model: nnx.Module) -> object:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda p: jnp.sum(nnx.merge(graph, p, rest, copy=True)(tokens))  # noqa: E731
        return jax.grad(loss)(params)

    model = models.TransformerLM(64, size, scan=scan, rngs=nnx.Rngs(0))
    return len(jax.jit(gradient).lower(model).as_text().splitlines())


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--depth", type=int, default=48, help="of the deeper program")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, median of {options.rounds} rounds, B={BATCH}, "
          f"T={LENGTH}, D={D}, {HEADS} heads")  # fmt: skip
    print(
        "| block | dtype | kept, N | temporaries, N | time over flaxstab's |\n|---|---|---|---|---|"
    )
    for dtype in ("float32", "bfloat16"):
        compare(dtype, options.rounds)
    for scan in (False, True):
        both = [lines(depth, scan=scan) for depth in (4, options.depth)]
        print(f"lines of the program at depth 4 and {options.depth}, scan={scan}: {both}")


if __name__ == "__main__":
    main()
