"""Attention: what flaxstab keeps, needs and takes beside flax.nnx, jax.nn and PyTorch.

Causal self-attention, with dropout 0.1 and without. Bytes are counted, so they do not depend on the
machine; times are ratios of medians to flaxstab's, all peers in turn, round after round: above 1,
the peer takes longer. ``jax.nn.dot_product_attention`` has no dropout; nnx's draws one mask for
each sample and head here, as PyTorch does, and not its default of one for all.
"""

import argparse
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from norm_peers import Figures, Peer, program_figures, torch_kept
from norms import optional, timed, versions

from flaxstab import functional
from parity_tests.support.kept import kept_bytes

DROPPED = 0.1
LINE = "{:9s} {:>5s} {:>8s} {:24s} {:>6s} {:>11s} {:>8s} {:>8s}"
HEADS = ("dtype", "S", "dropout", "peer", "kept", "temporaries", "fwd", "fwd+bwd")
LEGEND = (
    "kept (for the backward pass), temporaries (of the compiled forward and backward pass): in "
    "units of the query's bytes."
)


class Case(NamedTuple):
    """Causal self-attention of arrays ``(N, S, H, E)``."""

    shape: tuple[int, int, int, int]
    dtype: str
    p: float

    def arrays(self) -> list[np.ndarray]:
        """Query, key, value and the output's cotangent."""
        rng = np.random.default_rng(0)
        return [rng.standard_normal(self.shape, np.float32) for _ in range(4)]


def ours(case: Case) -> Callable[..., jax.Array]:
    """Returns flaxstab's attention."""
    return lambda q, k, v, key: functional.attention(
        q, k, v, is_causal=True, p=case.p, dropout_key=key
    )


def stock(case: Case) -> Callable[..., jax.Array]:
    """Returns flax.nnx's attention."""
    return lambda q, k, v, key: nnx.dot_product_attention(
        q, k, v, is_causal=True, dropout_rate=case.p, dropout_rng=key, broadcast_dropout=False
    )


def plain(case: Case) -> Callable[..., jax.Array]:
    """Returns JAX's attention, which has no dropout."""
    del case
    return lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def jax_peer(name: str, f: Callable[..., jax.Array], case: Case) -> Peer:
    """Compiles a function and its gradients for a case."""
    q, k, v, cotangent = (jnp.asarray(a, case.dtype) for a in case.arrays())
    key = jax.random.key_data(jax.random.key(0))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, key: jax.Array) -> jax.Array:
        return f(q, k, v, jax.random.wrap_key_data(key))

    def both(
        cotangent: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, key: jax.Array
    ) -> object:
        y, pullback = jax.vjp(lambda *a: attend(*a, key), q, k, v)
        return y, pullback(cotangent)

    forward = jax.jit(attend).lower(q, k, v, key).compile()
    whole = jax.jit(both).lower(cotangent, q, k, v, key).compile()
    kept = kept_bytes(attend, q, k, v, key) / q.nbytes
    return Peer(
        name,
        partial(forward, q, k, v, key),
        partial(whole, cotangent, q, k, v, key),
        jax.block_until_ready,
        {"kept": kept, **program_figures(whole, q.nbytes)},
    )


def torch_peer(case: Case) -> Peer:
    """Prepares PyTorch's attention, on (N, H, S, E) as it wants them."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    kind = getattr(torch, case.dtype)
    arrays = [torch.tensor(a).to(kind).transpose(1, 2).contiguous() for a in case.arrays()]
    *qkv, cotangent = arrays
    qkv = [a.requires_grad_() for a in qkv]

    def f(q: object, *rest: object) -> object:
        return attend(q, *rest, dropout_p=case.p, is_causal=True)

    def forward() -> object:
        with torch.no_grad():
            return f(*qkv)

    def both() -> object:
        y = f(*qkv)
        return y, torch.autograd.grad(y, qkv, cotangent)

    held = torch_kept(torch, lambda q: f(q, *qkv[1:]), qkv[0], [])
    kept = held / (qkv[0].numel() * qkv[0].element_size())
    return Peer("torch", forward, both, lambda _: None, {"kept": kept})


def peers(case: Case, has_torch: bool) -> Iterator[Peer]:
    """Yields every peer of a case."""
    yield jax_peer("flaxstab", ours(case), case)
    yield jax_peer("flax.nnx", stock(case), case)
    if case.p == 0:
        yield jax_peer("jax.nn", plain(case), case)
    if has_torch:
        yield torch_peer(case)


def line(case: Case, name: str, figures: Figures) -> str:
    """Returns a row of the table."""
    temporaries = figures.get("temporaries")
    return LINE.format(
        case.dtype, str(case.shape[1]), f"{case.p:g}", name, f"{figures['kept']:.2f}",
        "-" if temporaries is None else f"{temporaries:.1f}",
        f"{figures['forward_ratio']:.2f}", f"{figures['forward_backward_ratio']:.2f}",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[tuple[Case, str, Figures]]:
    """Prints the table as it grows, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=int, nargs=3, default=[1, 4, 64], metavar=("N", "H", "E"))
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args(arguments)
    torch, reason = optional("torch")
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": versions(),
        "N, H, E": chosen.sizes,
    }
    print(*(f"{name}: {value}" for name, value in about.items()), reason, LEGEND, sep="\n")
    print(LINE.format(*HEADS))
    n, h, e = chosen.sizes
    table = []
    for dtype in chosen.dtypes:
        for p in (DROPPED, 0.0):
            for length in chosen.lengths:
                case = Case((n, length, h, e), dtype, p)
                found = timed(list(peers(case, torch is not None)), chosen.rounds, 1)
                for name, figures in found.items():
                    print(line(case, name, figures), flush=True)
                    table.append((case, name, figures))
    return table


if __name__ == "__main__":
    main()
