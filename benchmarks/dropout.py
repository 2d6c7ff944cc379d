"""Dropout: what flaxstab keeps, hashes and takes beside flax.nnx and PyTorch.

All peers of one case are timed in turn, in a new order in every round, and each median is given as
a ratio to flaxstab's with a Threefry key, JAX's default: above 1, the peer takes longer. The ways
to draw are compared with the same key implementation on both sides.
"""

import argparse
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx
from norm_peers import Figures, Peer, program_figures, torch_kept
from norms import QUEUED, optional, timed, versions

from flaxstab import functional
from parity_tests.support.hashes import hashes
from parity_tests.support.kept import kept_bytes

P = 0.1
SHAPES = ["8192x768", "32x256x768", "32x32x32x64"]
IMPLEMENTATIONS = ("threefry2x32", "philox4x32")
LEGEND = (
    "kept (for the backward pass) and temp (compiled temporaries, forward and backward) in units "
    "of the input's\nbytes; hashes: per element, forward; fwd, fwd+bwd: time over flaxstab's."
)
COLUMNS = ("kept", "temporaries", "hashes", "forward_ratio", "forward_backward_ratio")
TITLES = ("dtype", "shape", "peer", "kept", "temp", "hashes", "fwd", "fwd+bwd")
LINE = "{:9s} {:12s} {:22s} {:>6s} {:>6s} {:>6s} {:>6s} {:>7s}"

Drop = Callable[[jax.Array, jax.Array], jax.Array]


def ours(x: jax.Array, key: jax.Array) -> jax.Array:
    """Drops elements with flaxstab's function."""
    return functional.random_dropout(x, P, key)


def stock(x: jax.Array, key: jax.Array) -> jax.Array:
    """Drops elements with flax.nnx's layer."""
    return nnx.Dropout(P)(x, rngs=key)


def jax_peer(name: str, drop: Drop, x: jax.Array, impl: str) -> Peer:
    """Compiles dropout and its gradient for an input."""
    key = jax.random.key(0, impl=impl)

    def both(x: jax.Array, cotangent: jax.Array, key: jax.Array) -> object:
        y, pullback = jax.vjp(lambda x: drop(x, key), x)
        return y, pullback(cotangent)

    forward = jax.jit(drop).lower(x, key).compile()
    compiled = jax.jit(both).lower(x, x, key).compile()
    figures = {
        "kept": kept_bytes(drop, x, key) / x.nbytes,
        "hashes": hashes(drop, x, key) / x.size,
        **program_figures(compiled, x.nbytes),
    }
    wait = jax.block_until_ready
    return Peer(name, partial(forward, x, key), partial(compiled, x, x, key), wait, figures)


def torch_peer(torch: ModuleType, x: jax.Array) -> Peer:
    """Prepares PyTorch's function for an input."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, str(x.dtype))
    given = torch.ones(x.shape, dtype=dtype, device=device, requires_grad=True)
    cotangent = torch.ones_like(given)
    drop = partial(torch.nn.functional.dropout, p=P)

    def forward() -> object:
        with torch.no_grad():
            return drop(given)

    def both() -> object:
        y = drop(given)
        return y, torch.autograd.grad(y, given, cotangent)

    kept = torch_kept(torch, drop, given, []) / x.nbytes
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    return Peer("torch", forward, both, lambda _: wait(), {"kept": kept})


def peers(x: jax.Array, torch: ModuleType | None) -> Iterator[Peer]:
    """Yields every peer of a case."""
    for impl in IMPLEMENTATIONS:
        with_key = "" if impl == IMPLEMENTATIONS[0] else f", {impl}"
        yield jax_peer(f"flaxstab{with_key}", ours, x, impl)
        yield jax_peer(f"nnx{with_key}", stock, x, impl)
    if torch is not None:
        yield torch_peer(torch, x)


def line(dtype: str, shape: str, name: str, figures: Figures) -> str:
    """Returns a row of the table."""
    cells = (f"{figures[c]:.2f}" if c in figures else "-" for c in COLUMNS)
    return LINE.format(dtype, shape, name, *cells)


def main(arguments: Sequence[str] | None = None) -> dict[str, Figures]:
    """Prints the table as it grows; returns the last case's figures by peer."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__ or ''}\n{LEGEND}", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=25)
    chosen = parser.parse_args(arguments)
    gpu, (torch, no_torch) = jax.default_backend() == "gpu", optional("torch")
    print(datetime.datetime.now(datetime.UTC).date(), jax.devices()[0].device_kind, os.cpu_count())
    print(
        versions(), *filter(None, [no_torch]), f"median of {chosen.rounds} rounds", LEGEND, sep="\n"
    )
    print(LINE.format(*TITLES))
    found: dict[str, Figures] = {}
    for shape in chosen.shapes:
        for dtype in chosen.dtypes:
            x = jnp.ones(tuple(map(int, shape.split("x"))), dtype)
            found = timed(list(peers(x, torch)), chosen.rounds, QUEUED if gpu else 1)
            rows = (line(dtype, shape, *item) for item in found.items())
            print(*rows, sep="\n", flush=True)
    return found


if __name__ == "__main__":
    main()
