"""Blocks beside their PyTorch twins: many pairs in one compiled program."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flaxstab import interop, parity
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same, channels_first, channels_last

STEPS = (1, 2, 10)  # after which statistics are compared
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in half the time


class Pair(NamedTuple):
    """A block and its twin.

    Attributes:
      ours: builds the block from keyword options.
      theirs: builds the twin.
      shape: of the input, features last.
    """

    ours: Callable[..., nnx.Module]
    theirs: Callable[[], torch.nn.Module]
    shape: tuple[int, ...] = (3, 5, 4, 4)


class Outcome(NamedTuple):
    """What one side did, in float64, features last, by PyTorch's names.

    Attributes:
      output: in training, in the first step.
      gradients: for the input (``''``) and the parameters, for a random cotangent.
      statistics: after each of ``STEPS``.
      evaluation: the output after them.
    """

    output: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: list[dict[str, np.ndarray]]
    evaluation: np.ndarray


def drawn(pair: Pair) -> torch.nn.Module:
    """Returns the twin with scales and biases that no default hides."""
    torch.manual_seed(0)
    module = pair.theirs().double()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    return module


def batch(pair: Pair, step: int) -> np.ndarray:
    """Returns the input of a step, each with another mean and spread."""
    return values(*pair.shape, seed=step, offset=1.0 + step / 4)


def torch_outcome(pair: Pair, module: torch.nn.Module, block: nnx.Module) -> Outcome:
    """Runs a copy of a twin, which drops what the block will drop."""
    module = copy.deepcopy(module).train()
    with parity.replayed(block, module, "image"):
        return _torch_outcome(pair, module)


def _torch_outcome(pair: Pair, module: torch.nn.Module) -> Outcome:
    statistics: list[dict[str, np.ndarray]] = []
    for step in range(1, STEPS[-1] + 1):
        x = torch.tensor(batch(pair, step), requires_grad=step == 1)
        y = channels_last(module(channels_first(x)))
        if step == 1:
            inputs = {"": x, **dict(module.named_parameters())}
            cotangent = torch.tensor(values(*y.shape, seed=100))
            found = torch.autograd.grad(y, list(inputs.values()), cotangent)
            output, gradients = y.detach().numpy(), dict(zip(inputs, found, strict=True))
        if step in STEPS:
            statistics.append({n: b.numpy().copy() for n, b in module.named_buffers()})
    x = torch.tensor(batch(pair, 0))
    evaluation = channels_last(module.eval()(channels_first(x))).detach().numpy()
    return Outcome(output, {n: g.numpy() for n, g in gradients.items()}, statistics, evaluation)


def built(
    pairs: Mapping[str, Pair], modules: Mapping[str, torch.nn.Module]
) -> dict[str, nnx.Module]:
    """Returns the blocks in float64 with their twins' weights."""
    with jax.enable_x64(True):
        blocks = {n: p.ours(param_dtype="float64", rngs=nnx.Rngs(0)) for n, p in pairs.items()}
        for name, block in blocks.items():
            interop.load_state_dict(block, modules[name].state_dict())
    return blocks


def our_outcomes(pairs: Mapping[str, Pair], blocks: Mapping[str, nnx.Module]) -> dict[str, Outcome]:
    """Runs every block, unchanged: one program for training, one for evaluation."""
    with jax.enable_x64(True):
        whole = nnx.List(list(blocks.values()))
        batches = [[jnp.asarray(batch(p, step)) for p in pairs.values()]
                   for step in range(STEPS[-1] + 1)]  # fmt: skip
        graph, params, rest = nnx.split(whole, nnx.Param, ...)

        @partial(jax.jit, compiler_options=QUICKLY)
        def train(rest: nnx.State, xs: list[jax.Array]) -> tuple[object, ...]:
            def run(params: nnx.State, xs: list[jax.Array]) -> tuple[list[jax.Array], nnx.State]:
                blocks = nnx.merge(graph, params, rest, copy=True)
                ys = [block(x) for block, x in zip(blocks, xs, strict=True)]
                return ys, nnx.state(blocks, nnx.Not(nnx.Param))

            ys, pull, moved = jax.vjp(run, params, xs, has_aux=True)
            return ys, *pull([jnp.asarray(values(*y.shape, seed=100)) for y in ys]), moved

        first, statistics = None, []
        for step in range(1, STEPS[-1] + 1):
            found = train(rest, batches[step])
            first, rest = first or found, found[-1]
            if step in STEPS:
                statistics.append(rest)
        after = nnx.merge(graph, params, rest)
        after.eval()
        evaluate = jax.jit(
            lambda xs: [1 * block(x) for block, x in zip(after, xs, strict=True)],
            compiler_options=QUICKLY,
        )
        evaluated = evaluate(batches[0])
    outputs, gradients, inputs, _ = first
    result = {}
    for number, (name, block) in enumerate(blocks.items()):
        naming = interop.Naming(block)
        result[name] = Outcome(
            np.asarray(outputs[number]),
            {"": np.asarray(inputs[number])} | naming.tensors(gradients[number], gradients=True),
            [naming.tensors(state[number]) if number in state else {} for state in statistics],
            np.asarray(evaluated[number]),
        )
    return result


def assert_outcome(ours: Outcome, theirs: Outcome) -> None:
    """Everything is there, and agrees to 1e-12 of its magnitude."""
    assert_same(ours.output, theirs.output)
    assert_same(ours.evaluation, theirs.evaluation)
    assert ours.gradients.keys() == theirs.gradients.keys()
    # A kernel's gradient is a sum of products of cotangents and activations of size 1 and more.
    size = max(float(np.abs(g).max()) for g in theirs.gradients.values())
    for name, gradient in theirs.gradients.items():
        assert_same(ours.gradients[name], gradient, size)
    for found, expected in zip(ours.statistics, theirs.statistics, strict=True):
        assert found.keys() == expected.keys()
        for name, statistic in expected.items():
            assert_same(found[name], statistic)
