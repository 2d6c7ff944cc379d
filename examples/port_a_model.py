"""A ResNet moves from PyTorch to JAX in the middle of its training: weights, statistics, optimizer.

PyTorch trains for half of the steps. Then flaxstab's ResNet takes the state_dict, every layer is
compared forward and backward, the optimizer takes the moments, and JAX trains on. Beside it PyTorch
trains on, to compare with, and JAX without the moments, to show what losing them costs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import optax
import torch
from _cli import Parser, add_output, add_seed, leave, make_folder, whole
from _data import load_small
from _output import save_figure
from flax import nnx
from rich.console import Console
from rich.table import Table

from flaxstab import functional, interop, models, optim, parity
from torch_ref.resnet import ResNet as TorchResNet

mpl.use("Agg")
from matplotlib import pyplot as plt

LAYERS, WIDTH, CLASSES, BATCH = (1, 1), 8, 10, 64
RATE, DECAY = 3e-3, 0.05
LOCATED = (4, 12, 12, 3)  # the images on which layers are compared
NEAR = 0.1  # of the distance without moments: how far JAX with them may be from PyTorch

Batches = list[tuple[np.ndarray, np.ndarray]]


class Continued(NamedTuple):
    """The losses of the second half.

    Attributes:
      torch: PyTorch's.
      jax: those of JAX with PyTorch's weights and optimizer state.
      fresh: those of JAX with the weights alone.
    """

    torch: np.ndarray
    jax: np.ndarray
    fresh: np.ndarray

    @property
    def ratio(self) -> float:
        """The distance of ``jax`` from ``torch`` over that of ``fresh``: the largest of each."""
        with_moments, without = (np.abs(a - self.torch).max() for a in (self.jax, self.fresh))
        return float(with_moments / without)

    @property
    def carries_on(self) -> bool:
        """Whether JAX goes on as PyTorch does."""
        return bool(np.isfinite(self.jax).all()) and self.ratio <= NEAR


def batches(steps: int, seed: int) -> Batches:
    """Returns random batches of the images that ship with the repository, features last."""
    data, rng = load_small().normalized(np.dtype(np.float32)), np.random.default_rng(seed)
    places = (rng.choice(len(data.train_labels), BATCH, replace=False) for _ in range(steps))
    return [(data.train_images[p], data.train_labels[p]) for p in places]


def torch_model(seed: int) -> torch.nn.Module:
    """Returns a small ResNet with random weights and random running statistics."""
    torch.manual_seed(seed)
    model = TorchResNet("basic", LAYERS, CLASSES, "cifar", WIDTH)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0.0, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def torch_train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, given: Batches
) -> Iterator[float]:
    """Trains PyTorch's model; yields each step's loss."""
    for images, labels in given:
        logits = model(torch.from_numpy(images).movedim(-1, 1))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def flax_model() -> nnx.Module:
    """Returns flaxstab's ResNet of that size; its weights will be replaced."""
    size = models.ResNetSize(block="basic", layers=LAYERS, width=WIDTH)
    return models.ResNet(size, CLASSES, stem="cifar", rngs=nnx.Rngs(0))


def optimizer_of(model: nnx.Module) -> nnx.Optimizer:
    """Returns the counterpart of ``torch.optim.AdamW``."""
    transformation: optax.GradientTransformation = optim.adamw(RATE, weight_decay=DECAY)
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


@nnx.jit
def _step(model: nnx.Module, optimizer: nnx.Optimizer, x: np.ndarray, y: np.ndarray) -> object:
    def loss_of(model: nnx.Module) -> object:
        return functional.cross_entropy(model(x), y)

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def flax_train(model: nnx.Module, optimizer: nnx.Optimizer, given: Batches) -> Iterator[float]:
    """Trains the Flax model; yields each step's loss."""
    model.train()
    for images, labels in given:
        yield float(_step(model, optimizer, images, labels))


def continued(
    module: torch.nn.Module, theirs: torch.optim.Optimizer, given: Batches
) -> tuple[Continued, interop.LoadReport]:
    """Trains on, on both sides; returns the losses and what was loaded."""
    weights, state = module.state_dict(), theirs.state_dict()
    names = [name for name, _ in module.named_parameters()]
    model, alone = flax_model(), flax_model()
    report = interop.load_state_dict(model, weights)
    interop.load_state_dict(alone, weights)
    optimizer = optimizer_of(model)
    interop.load_optimizer_state_dict(optimizer, model, state, names=names)
    # JAX first: PyTorch changes its tensors in place.
    ours = np.array(list(flax_train(model, optimizer, given)))
    fresh = np.array(list(flax_train(alone, optimizer_of(alone), given)))
    return Continued(np.array(list(torch_train(module, theirs, given))), ours, fresh), report


def located(module: torch.nn.Module) -> parity.Location:
    """Compares logits and gradients, layer by layer."""
    images = np.random.default_rng(0).normal(0.3, 1.0, LOCATED)
    return parity.locate(flax_model(), module, images, layout="image")


def draw(before: Sequence[float], after: Continued) -> "plt.Figure":
    """Draws the losses before and behind the move."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    steps = np.arange(1, len(before) + len(after.torch) + 1)
    here = len(before)
    axis.plot(steps[:here], before, color="tab:gray", label="PyTorch")
    axis.plot(steps[here:], after.torch, color="tab:gray")
    axis.plot(steps[here:], after.fresh, color="tab:red", lw=1, label="JAX, weights alone")
    axis.plot(steps[here:], after.jax, color="tab:blue", ls="--", label="JAX, optimizer state too")
    axis.axvline(here + 0.5, color="black", lw=0.8, ls=":")
    axis.set(xlabel="step", ylabel="training loss", title="From PyTorch to JAX between two steps")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _layers(location: parity.Location) -> Table:
    table = Table(title="Each layer alone, given what PyTorch's is given (error over its bound)")
    for title in ("layer", "forward", "backward"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    found: dict[str, dict[str, str]] = {}
    for error in location.layers:
        found.setdefault(error.name, {})[error.direction] = f"{error.own:.1e}"
    for name, errors in found.items():
        table.add_row(name, errors.get("forward", ""), errors.get("backward", ""))
    return table


def _losses(after: Continued, first: int) -> Table:
    table = Table(title="Training loss behind the move")
    for title in ("step", "PyTorch", "JAX", "JAX without moments"):
        table.add_column(title, justify="right")
    shown = np.unique(np.linspace(0, len(after.torch) - 1, 6).astype(int))
    for place in shown:
        losses = (f"{losses[place]:.6f}" for losses in (after.torch, after.jax, after.fresh))
        table.add_row(str(first + place + 1), *losses)
    return table


def _timed(console: Console, what: str, run: Callable[[], object]) -> object:
    start = time.perf_counter()
    result = run()
    console.print(f"{what}: {time.perf_counter() - start:.0f} s")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code: 1 if a layer differs or the curve does not go on."""
    parser = Parser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=whole(2, 10_000), default=30, metavar="N",
                        help="on either side of the move (default: 30)")  # fmt: skip
    add_seed(parser)
    add_output(parser, "runs/port_a_model")
    options = parser.parse_args(arguments)
    folder, console = make_folder(parser, options.output), Console()
    given = batches(2 * options.steps, options.seed)
    module = torch_model(options.seed)
    theirs = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=DECAY)
    before = list(torch_train(module, theirs, given[: options.steps]))
    location = _timed(console, "Layers compared", lambda: located(module))
    console.print(_layers(location), location.line, sep="\n", highlight=False)
    after, report = _timed(
        console, "Trained on", lambda: continued(module, theirs, given[options.steps :])
    )
    console.print(f"{report}", _losses(after, options.steps), sep="\n", highlight=False)
    path = folder / "loss_curve.png"
    save_figure(path, draw(before, after))
    console.print(f"Written: [bold]{path}[/]", highlight=False)
    verdict = "carries on" if after.carries_on else "does NOT carry on"
    console.print(
        f"The loss curve {verdict}: JAX is at most {after.ratio:.1e} as far from PyTorch as it is "
        f"without the moments (allowed: {NEAR}).", highlight=False,
    )  # fmt: skip
    return int(bool(location.first) or not after.carries_on)


if __name__ == "__main__":
    leave(main())
