"""Every combination of the optimizers' options, in one program of JAX and in PyTorch in turn."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from flaxstab import optim
from parity_tests.support.cases import values
from parity_tests.support.layers import SEMANTICS

RATE = 0.02
STEPS = 30
SHAPES = {"kernel": (5, 4), "bias": (4,), "gain": ()}
STATE = {
    "mu": "exp_avg",
    "nu": "exp_avg_sq",
    "nu_max": "max_exp_avg_sq",
    "trace": "momentum_buffer",
}
# Of every size: tiny gradients show where eps is added, 0 shows decay alone.
SCALES = (1.0, 0.5, 1e-2, 1e-6, 0.0, 1e2, 1.0, 1e-4, 10.0, 0.1)

Tree = dict[str, np.ndarray]
Params = Iterable[torch.nn.Parameter]
Trace = dict[str, np.ndarray]  # quantities by name, such as "mu kernel", each step after step


class Case(NamedTuple):
    """An optimizer with options that both sides take by the same names."""

    ours: Callable[..., optax.GradientTransformation]
    theirs: type[torch.optim.Optimizer]
    options: Mapping[str, object]

    def make(self, *, own_steps: bool = False) -> optax.GradientTransformation:
        return self.ours(RATE, **self.options, own_steps=own_steps)

    def twin(self, params: Params) -> torch.optim.Optimizer:
        return self.theirs(params, lr=RATE, foreach=False, **self.options)


def _product(**options: Sequence[object]) -> Iterator[dict[str, object]]:
    for chosen in itertools.product(*options.values()):
        yield dict(zip(options, chosen, strict=True))


FLAGS = {"amsgrad": (False, True), "maximize": (False, True), "weight_decay": (0.0, 0.05)}
NUMBERS = [((0.9, 0.999), 1e-8), ((0.0, 0.99), 0.3), ((0.8, 0.0), 1e-8)]
ADAM = [
    {**flags, "betas": betas, "eps": eps} for flags in _product(**FLAGS) for betas, eps in NUMBERS
]
SGD = [
    options
    for options in _product(
        momentum=(0.0, 0.9), dampening=(0.0, 0.3), weight_decay=(0.0, 0.05),
        nesterov=(False, True), maximize=(False, True),
    )
    if not options["nesterov"] or (options["momentum"] and not options["dampening"])
]  # fmt: skip
CASES = [
    *(Case(optim.adamw, torch.optim.AdamW, options) for options in ADAM),
    *(Case(optim.adam, torch.optim.Adam, options) for options in ADAM),
    *(Case(optim.sgd, torch.optim.SGD, options) for options in SGD),
]


def problem(dtype: str = "float64") -> tuple[Tree, Tree]:
    """Returns parameters and their gradients in every step, as a dtype holds them, in float64."""
    params, gradients = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        scales = np.resize(SCALES, STEPS).reshape(STEPS, *(1,) * len(shape))
        params[name] = values(*shape, seed=seed)
        gradients[name] = scales * values(STEPS, *shape, seed=10 + seed, offset=0.1, scale=1.0)
    return jax.tree.map(lambda a: a.astype(dtype).astype(np.float64), (params, gradients))


def run_ours(
    txs: Sequence[optax.GradientTransformation],
    params: Tree,
    gradients: Mapping[str, np.ndarray | None],
) -> list[Trace]:
    """Runs all optimizers in one compiled loop.

    Args:
      txs: the optimizers.
      params: parameters at first, in the dtype to compute in.
      gradients: for every step; ``None`` for a parameter that never gets one.
    """
    given = {name: jnp.asarray(a) for name, a in params.items()}
    starts = [(given, tx.init(given)) for tx in txs]

    def step(carried: list[object], gradient: Mapping[str, jax.Array | None]) -> tuple[object, ...]:
        found = []
        for tx, (p, state) in zip(txs, carried, strict=True):
            update, after = tx.update(gradient, state, p)
            found.append((optax.apply_updates(p, update), after, update))
        return [one[:2] for one in found], found

    arrays = {n: None if g is None else jnp.asarray(g) for n, g in gradients.items()}
    _, found = jax.jit(lambda start: jax.lax.scan(step, start, arrays))(starts)
    return [_named(*one) for one in found]


def _named(params: Mapping[str, jax.Array], state: object, updates: object) -> Trace:
    trees = {"param": params, "update": updates, **state._asdict()}
    trees = {key: tree for key, tree in trees.items() if isinstance(tree, dict)}
    trace = {f"{key} {n}": np.asarray(a) for key, tree in trees.items() for n, a in tree.items()}
    sat = (
        np.zeros((STEPS, len(params)), int) if state.skipped is None else np.asarray(state.skipped)
    )
    for i, name in enumerate(sorted(params)):
        trace[f"step {name}"] = np.asarray(state.count) - sat[:, i]
    return trace


def run_torch(
    make: Callable[[Params], torch.optim.Optimizer],
    params: Tree,
    gradients: Mapping[str, Sequence[np.ndarray | None] | None],
) -> Trace:
    """Runs one optimizer; a gradient of ``None``, for all steps or for one, stays ``None``."""
    tensors = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in params.items()}
    optimizer = make(tensors.values())
    steps: dict[str, list[np.ndarray]] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        steps.setdefault(name, []).append(tensor.detach().numpy().copy())

    for i in range(STEPS):
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            gradient = None if gradients[name] is None else gradients[name][i]
            tensor.grad = None if gradient is None else torch.tensor(gradient)
        optimizer.step()
        for name, tensor in tensors.items():
            note(f"param {name}", tensor)
            note(f"update {name}", tensor - before[name])
            entry = optimizer.state.get(tensor, {})
            for ours, theirs in STATE.items():
                if entry.get(theirs) is not None:
                    note(f"{ours} {name}", entry[theirs])
            if "step" in entry:
                note(f"step {name}", entry["step"])
    return {name: np.stack(list(arrays)) for name, arrays in steps.items()}


def differences(ours: Trace, theirs: Trace) -> list[str]:
    """Names what PyTorch has and JAX does not compute to 1e-12 of its size in every step."""
    wrong = []
    for name, expected in theirs.items():
        found, kind = ours[name], name.split()[0]
        if found.shape != expected.shape or (kind != "step" and found.dtype != expected.dtype):
            wrong.append(f"{name}: {found.shape} {found.dtype}")
            continue
        axes = tuple(range(1, expected.ndim))
        size = np.max(np.abs(expected), axis=axes, initial=0)
        if kind == "update":
            # Read off two parameters in PyTorch, whose rounding it carries.
            rounding = np.finfo(np.float64).eps * np.max(np.abs(theirs[f"param {name[7:]}"]), axes)
            size = np.maximum(size, 2 * rounding / SEMANTICS)
        gap = np.max(np.abs(found - expected), axis=axes, initial=0)
        if not np.all(gap <= SEMANTICS * size):  # also for NaN
            wrong.append(f"{name} in step {np.argmax(gap > SEMANTICS * size) + 1}")
    return wrong


def errors(found: Trace, exact: Trace) -> dict[str, float]:
    """Returns the worst error of each kind of quantity, in any tensor and step.

    In eps of the found dtype times the tensor's largest size so far, for parameters and moments
    remember what was larger; an update is read off two parameters and has the parameter's size.
    """
    worst: dict[str, float] = {}
    for name, expected in exact.items():
        kind, tensor = name.split()
        if kind == "step":
            continue
        axes = tuple(range(1, expected.ndim))
        sized = exact[f"param {tensor}"] if kind == "update" else expected
        size = np.maximum.accumulate(np.max(np.abs(sized), axis=axes, initial=0))
        gap = np.max(np.abs(found[name] - expected), axis=axes, initial=0)
        eps = float(np.finfo(found[name].dtype).eps)
        relative = np.divide(gap, eps * size, out=np.where(gap > 0, np.inf, 0.0), where=size > 0)
        worst[kind] = max(worst.get(kind, 0.0), float(np.max(relative)))
    return worst


def worse_than_torch(ours: Trace, theirs: Trace, exact: Trace) -> dict[str, tuple[float, float]]:
    """Returns the kinds in which JAX's error is above twice PyTorch's plus 2 eps, with both."""
    mine, torchs = errors(ours, exact), errors(theirs, exact)
    return {k: (mine[k], torchs[k]) for k in mine if not mine[k] <= 2 * torchs[k] + 2}
