"""How far optax's optimizers end from PyTorch's of the same name, and what closes the gap.

Both take 30 steps from the same parameters with the same gradients, in float64. What is printed is
the largest distance between them, over how far PyTorch's moved that tensor. With the defaults only
the learning rate is the same; "closest" are the arguments that come nearest. The table is the one
in ``docs/optim.md``.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

RATE, STEPS = 0.02, 30
SHAPES = {"kernel": (5, 4), "bias": (4,)}
SCALES = (1.0, 0.5, 1e-2, 1e-4, 0.0, 10.0)

Tree = Mapping[str, np.ndarray]
Factory = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Peer(NamedTuple):
    """An optimizer of both libraries.

    Attributes:
      theirs: makes PyTorch's, with its defaults.
      plain: optax's, with its defaults.
      closest: optax's, with the arguments that come nearest.
      arguments: those, as a user types them.
      why: what remains.
    """

    theirs: Factory
    plain: optax.GradientTransformation
    closest: optax.GradientTransformation
    arguments: str
    why: str


PEERS = {
    "RMSprop": Peer(
        lambda ps: torch.optim.RMSprop(ps, lr=RATE),
        optax.rmsprop(RATE),
        optax.rmsprop(RATE, decay=0.99, eps_in_sqrt=False),
        "`decay=0.99, eps_in_sqrt=False`",
        "nothing",
    ),
    "RMSprop, momentum 0.9, centered": Peer(
        lambda ps: torch.optim.RMSprop(ps, lr=RATE, momentum=0.9, centered=True),
        optax.rmsprop(RATE, momentum=0.9, centered=True),
        optax.rmsprop(RATE, decay=0.99, eps_in_sqrt=False, momentum=0.9, centered=True),
        "`decay=0.99, eps_in_sqrt=False, momentum=0.9, centered=True`",
        "nothing",
    ),
    "Adagrad": Peer(
        lambda ps: torch.optim.Adagrad(ps, lr=RATE),
        optax.adagrad(RATE),
        optax.adagrad(RATE, initial_accumulator_value=0.0, eps=1e-20),
        "`initial_accumulator_value=0.0, eps=1e-20`",
        "optax adds eps inside the root, PyTorch 1e-10 outside",
    ),
    "NAdam": Peer(
        lambda ps: torch.optim.NAdam(ps, lr=RATE),
        optax.nadam(RATE),
        optax.nadam(RATE),
        "none",
        "PyTorch's momentum grows with the step (`momentum_decay=4e-3`)",
    ),
    "RAdam": Peer(
        lambda ps: torch.optim.RAdam(ps, lr=RATE),
        optax.radam(RATE),
        optax.radam(RATE),
        "none",
        "PyTorch adds eps before the correction, optax after it",
    ),
}


def problem() -> tuple[Tree, Tree]:
    """Returns parameters, and their gradients in every step."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(1.0, 1.0, shape) for name, shape in SHAPES.items()}
    scales = np.resize(SCALES, STEPS)
    gradients = {
        name: scales.reshape(-1, *(1,) * len(shape)) * rng.normal(0.3, 1.0, (STEPS, *shape))
        for name, shape in SHAPES.items()
    }
    return params, gradients


def optax_moves(tx: optax.GradientTransformation) -> Tree:
    """Returns the parameters after all steps."""
    with jax.enable_x64(True):
        params, gradients = jax.tree.map(jnp.asarray, problem())

        def step(carried: tuple[object, object], gradient: object) -> tuple[object, None]:
            p, state = carried
            updates, state = tx.update(gradient, state, p)
            return (optax.apply_updates(p, updates), state), None

        (after, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, gradients))(
            (params, tx.init(params))
        )
    return {name: np.asarray(a) for name, a in after.items()}


def torch_moves(make: Factory) -> Tree:
    """Returns the parameters after all steps."""
    params, gradients = problem()
    tensors = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in params.items()}
    optimizer = make(list(tensors.values()))
    for i in range(STEPS):
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name][i])
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def gap(tx: optax.GradientTransformation, make: Factory) -> float:
    """Returns the largest distance of optax's end from PyTorch's, over the way PyTorch went."""
    start, _ = problem()
    ours, theirs = optax_moves(tx), torch_moves(make)
    gaps = [
        np.max(np.abs(ours[name] - theirs[name])) / np.max(np.abs(theirs[name] - start[name]))
        for name in start
    ]
    return float(max(gaps))


def rows() -> dict[str, tuple[float, float]]:
    """Returns the gap with optax's defaults and with the closest arguments, by optimizer."""
    return {
        name: (gap(peer.plain, peer.theirs), gap(peer.closest, peer.theirs))
        for name, peer in PEERS.items()
    }


def main() -> None:
    """Prints the table."""
    print("| optimizer | optax's defaults | closest arguments | gap left | what remains |")
    print("|---|---|---|---|---|")
    for name, (plain, closest) in rows().items():
        peer = PEERS[name]
        print(f"| {name} | {plain:.1e} | {peer.arguments} | {closest:.1e} | {peer.why} |")


if __name__ == "__main__":
    main()
