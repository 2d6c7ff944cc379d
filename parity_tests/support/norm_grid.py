"""Ten steps of a norm beside PyTorch's in float64: what both find, and where they differ."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, channels_first, channels_last

STEPS = 10
NAMES = {
    "scale": "weight", "bias": "bias",
    "mean": "running_mean", "var": "running_var", "count": "num_batches_tracked",
}  # fmt: skip
OURS = {theirs: ours for ours, theirs in NAMES.items()}
Quantities = dict[str, np.ndarray]
Groups = Callable[[np.ndarray], list[np.ndarray]]


class Twin(NamedTuple):
    """One configuration on both sides, with the same parameters and statistics in float64.

    Attributes:
      name: what is asserted about it is told by.
      ours: the layer.
      theirs: PyTorch's.
      groups: cuts an input into the sets of values that share their statistics.
      image: whether PyTorch wants axis 1 to be the channels.
      differentiated: whether gradients are compared.
    """

    name: str
    ours: nnx.Module
    theirs: torch.nn.Module
    groups: Groups
    image: bool = True
    differentiated: bool = True


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Gives parameters and running statistics values that no default hides."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def twin(
    ours: Callable[..., nnx.Module],
    theirs: Callable[..., torch.nn.Module],
    *arguments: object,
    groups: Groups,
    image: bool = True,
    differentiated: bool = True,
    **options: object,
) -> Twin:
    """Builds both sides with the same arguments; must run with x64 on."""
    other = randomised(theirs(*arguments, **options).double())
    layer = ours(*arguments, **options, param_dtype=jnp.float64)
    for name, tensor in other.state_dict().items():
        variable = getattr(layer, OURS[name])
        variable[...] = jnp.array(tensor.numpy(), variable.dtype)  # a copy: theirs will change
    return Twin(f"{arguments} {options}", layer, other, groups, image, differentiated)


def batches(*shape: int) -> np.ndarray:
    """Ten batches whose channels have different means and deviations."""
    channels = np.arange(shape[-1])
    return values(STEPS, *shape) * (1 + channels / 4) + channels


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets PyTorch compute small arrays without waking threads: 20 times as fast."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_torch(case: Twin, xs: np.ndarray, cotangent: np.ndarray) -> Quantities | None:
    """What PyTorch finds in ten steps, or None where it refuses the input."""
    theirs = case.theirs.train()

    def theirs_of(array: np.ndarray) -> torch.Tensor:
        # Contiguous: at N=1 InstanceNorm's gradient is wrong for a cotangent that is not.
        tensor = torch.tensor(array)
        return channels_first(tensor).contiguous() if case.image else tensor

    def ours_of(tensor: torch.Tensor) -> np.ndarray:
        return (channels_last(tensor) if case.image else tensor).detach().numpy()

    x = theirs_of(xs[0]).requires_grad_()
    try:
        y = theirs(x)
    except ValueError:
        return None
    found = {"output": ours_of(y)}
    if case.differentiated:
        parameters = dict(theirs.named_parameters())
        wanted = [x, *parameters.values()]
        of_input, *own = torch.autograd.grad(y, wanted, theirs_of(cotangent))
        found["grad input"] = ours_of(of_input)
        found |= {f"grad {n}": g.numpy() for n, g in zip(parameters, own, strict=True)}
    states = [_buffers(theirs)]
    with torch.no_grad():
        for batch in xs[1:] if states[0] else ():
            theirs(theirs_of(batch))
            states.append(_buffers(theirs))
        found["evaluation"] = ours_of(theirs.eval()(x))
    return found | {name: np.stack([state[name] for state in states]) for name in states[0]}


def _buffers(module: torch.nn.Module) -> Quantities:
    return {name: buffer.numpy().copy() for name, buffer in module.named_buffers()}


def run_ours(cases: Sequence[Twin], xs: np.ndarray, cotangent: np.ndarray) -> list[Quantities]:
    """What the layers find in ten steps: one program for all of them, since compiling costs."""
    parts = [nnx.split(case.ours, nnx.Param, ...) for case in cases]
    graphs, params, rests = ([part[i] for part in parts] for i in range(3))

    def run(params: list[nnx.State], rests: list[nnx.State], xs: jax.Array) -> list[object]:
        def follow(states: list[nnx.State], x: jax.Array) -> tuple[object, object]:
            after = [_step(*one, x)[1] for one in zip(graphs, params, states, strict=True)]
            return after, after

        firsts = [
            _first_step(*one, xs[0], cotangent if case.differentiated else None)
            for *one, case in zip(graphs, params, rests, cases, strict=True)
        ]
        start = [first.pop("state") for first in firsts]
        last = later = start
        if jax.tree.leaves(start):  # without statistics all steps are alike
            last, later = jax.lax.scan(follow, start, xs[1:])
        evaluated = [_evaluate(*one, xs[0]) for one in zip(graphs, params, last, strict=True)]
        states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, later)
        return [
            first | {"evaluation": y, "state": state}
            for first, y, state in zip(firsts, evaluated, states, strict=True)
        ]

    found = jax.jit(run)(params, rests, jnp.asarray(xs))
    return [_by_torchs_names(quantities) for quantities in found]


def _step(
    graph: nnx.GraphDef, params: nnx.State, rest: nnx.State, x: jax.Array
) -> tuple[jax.Array, nnx.State]:
    layer = nnx.merge(graph, params, rest, copy=True)
    return layer(x), nnx.state(layer, nnx.BatchStat)


def _first_step(
    graph: nnx.GraphDef,
    params: nnx.State,
    rest: nnx.State,
    x: jax.Array,
    cotangent: np.ndarray | None,
) -> dict[str, object]:
    def step(params: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        return _step(graph, params, rest, x)

    if cotangent is None:
        y, state = step(params, x)
        return {"output": y, "state": state}
    y, pullback, state = jax.vjp(step, params, x, has_aux=True)
    own, of_input = pullback(jnp.asarray(cotangent))
    return {"output": y, "state": state, "grad input": of_input, "grad": own}


def _evaluate(graph: nnx.GraphDef, params: nnx.State, rest: nnx.State, x: jax.Array) -> jax.Array:
    layer = nnx.merge(graph, params, rest, copy=True)
    layer.eval()
    return layer(x)


def _by_torchs_names(found: dict[str, object]) -> Quantities:
    arrays = ("output", "evaluation", "grad input")
    flat = {name: np.asarray(found[name]) for name in arrays if name in found}
    for name, array in nnx.to_pure_dict(found.get("grad", nnx.State({}))).items():
        flat[f"grad {NAMES[name]}"] = np.asarray(array)
    for name, array in nnx.to_pure_dict(found["state"]).items():
        flat[NAMES[name]] = np.asarray(array, np.int64 if name == "count" else None)
    return flat


def sizes(case: Twin, x: np.ndarray, cotangent: np.ndarray) -> dict[str, float]:
    """The largest terms of each quantity's sums: they cancel where few values share statistics."""
    least = min((group.var() for group in case.groups(x) if group.size), default=1.0)
    parameters = dict(case.theirs.named_parameters())
    scale = parameters["weight"].abs().max().item() if "weight" in parameters else 1.0
    sharpest = scale / np.sqrt(least + case.theirs.eps)
    term, largest = (float(np.abs(a).max(initial=0)) for a in (cotangent, x))
    return {
        "output": largest * sharpest,
        "evaluation": largest * sharpest,
        "grad input": term * sharpest,
        "grad weight": term * largest * sharpest,
        "running_mean": largest,
    }


def differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], sizes: Mapping[str, float]
) -> list[str]:
    """The quantities on which the sides differ by more than 1e-12 of the magnitude, with why."""
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    found = []
    for name, array in theirs.items():
        try:
            assert_same(ours[name], array, sizes.get(name, 0.0))
        except AssertionError as why:
            found.append(f"{name}: {why}")
    return found


def check(cases: Sequence[Twin], *shape: int) -> list[str]:
    """Every difference of every case on inputs of a shape, refusals included.

    Args:
      cases: of layers that take the shape.
      *shape: of each of the ten batches.
    """
    xs, cotangent = batches(*shape), values(*shape, seed=1)
    with one_thread():
        theirs = [run_torch(case, xs, cotangent) for case in cases]
    kept = [case for case, other in zip(cases, theirs, strict=True) if other is not None]
    ours = iter(run_ours(kept, xs, cotangent))
    found = []
    for case, other in zip(cases, theirs, strict=True):
        if other is None:
            found += [] if _refuses(case.ours, xs[0]) else [f"{case.name} takes {shape}"]
            continue
        wrong = differences(next(ours), other, sizes(case, xs[0], cotangent))
        found += [f"{case.name} {shape}: {words}" for words in wrong]
    return found


def _refuses(layer: nnx.Module, x: np.ndarray) -> bool:
    try:
        layer(jnp.asarray(x))
    except ValueError as error:
        return "more than 1" in str(error)
    return False
