"""How initialisation carries the spread of activations through ten ReLU layers.

Document 2, section H-1: Kaiming keeps the spread, Xavier halves the variance at every layer.
"""

import importlib.util
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from _cli import Parser, add_output, leave, make_folder, whole
from _output import save_figure
from flax import nnx
from rich.console import Console
from rich.table import Table

from flaxstab import interop, models

mpl.use("Agg")
from matplotlib import pyplot as plt

LAYERS = np.arange(1, 11)
# Behind a ReLU whose input has variance 2: E[h^2] = 1 and E[h] = 1 / sqrt(pi).
STEADY = math.sqrt(1 - 1 / math.pi)
EXPECTED = {"xavier": STEADY * 2 ** (-LAYERS / 2), "kaiming": STEADY * np.ones(len(LAYERS))}


def spreads(init_name: str, seed: int) -> tuple[models.ToyDeep, np.ndarray, np.ndarray]:
    """Returns a network, its input, and the standard deviation behind each of its ReLUs."""
    model = models.ToyDeep(init_name, rngs=nnx.Rngs(seed))
    x = jax.random.normal(jax.random.key(1000 + seed), (256, 512))
    return model, np.asarray(x), np.array([float(jnp.std(h)) for h in model.activations(x)])


def beside_torch(model: models.ToyDeep, x: np.ndarray, ours: np.ndarray) -> float | None:
    """Returns the largest relative difference to PyTorch with the same weights, if installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    from torch_ref.models import ToyDeep, activation_stds

    twin = ToyDeep()
    weights = interop.state_dict(model)
    twin.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    # torch's std is the unbiased one.
    count = x.shape[0] * 512
    theirs = np.array(activation_stds(twin, torch.tensor(x))) * math.sqrt((count - 1) / count)
    return float(np.max(np.abs(ours - theirs) / theirs))


def draw(measured: dict[str, np.ndarray]) -> "plt.Figure":
    """Draws the spread against depth, measured and expected."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, values), color in zip(measured.items(), ("tab:red", "tab:green"), strict=True):
        axis.plot(LAYERS, EXPECTED[name], color=color, ls="--", label=f"{name}, expected")
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        axis.errorbar(LAYERS, mean, (mean - low, high - mean), fmt="o", color=color,
                      label=f"{name}, measured (range over seeds)")  # fmt: skip
    axis.set(yscale="log", xlabel="layer", ylabel="standard deviation behind the ReLU",
             title="Ten layers of 512 units with ReLU")  # fmt: skip
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = Parser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--seeds", type=whole(1, 1000), default=5, metavar="N", help="networks (default: 5)"
    )
    add_output(parser, "runs/variance_propagation")
    options = parser.parse_args(arguments)
    folder = make_folder(parser, options.output)
    console, measured, gaps = Console(), {}, []
    for name in EXPECTED:
        runs = [spreads(name, seed) for seed in range(options.seeds)]
        measured[name] = np.array([values for _, _, values in runs])
        gaps += [beside_torch(*run) for run in runs]
    table = Table(title="Standard deviation behind each ReLU")
    table.add_column("layer", justify="right")
    for name in EXPECTED:
        table.add_column(name, justify="right")
        table.add_column("expected", justify="right")
    for i, layer in enumerate(LAYERS):
        cells = [(measured[n][:, i].mean(), EXPECTED[n][i]) for n in EXPECTED]
        table.add_row(str(layer), *(f"{value:.4f}" for pair in cells for value in pair))
    console.print(table)
    if None in gaps:
        console.print("PyTorch is not installed: not compared with it.")
    else:
        console.print(f"PyTorch, same weights: largest relative difference {max(gaps):.1e}")
    path = folder / "variance.png"
    save_figure(path, draw(measured))
    console.print(f"Written: [bold]{path}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    leave(main())
