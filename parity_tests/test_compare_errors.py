"""``compare`` refuses what it cannot judge in one line that names the place and the fix."""

import re
from collections.abc import Callable

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import Tensor

from flaxstab import linear, norms, parity
from parity_tests.support.cases import values
from parity_tests.support.pairs import refusal

X = values(8, 4)
IMAGES = values(2, 6, 6, 4)
RNGS = nnx.Rngs(0)


class Block(nnx.Module):
    def __init__(self, width: int) -> None:
        self.conv = linear.Conv(width, 4, 3, rngs=RNGS)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Nested(nnx.Module):
    def __init__(self, width: int) -> None:
        self.blocks = nnx.List([norms.LayerNorm(4), Block(width)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class TorchBlock(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(width, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TorchNested(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.LayerNorm(4), TorchBlock(width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x.movedim(1, -1)).movedim(-1, 1))


def test_the_models_of_these_tests_run_when_nothing_is_wrong() -> None:
    report = parity.compare(Nested(4), TorchNested(4), IMAGES, layout="image", dtypes=())
    assert report.passed, str(report)


def test_an_error_inside_a_flax_model_names_the_submodule() -> None:
    message = refusal(lambda: parity.compare(Nested(5), TorchNested(5), IMAGES, layout="image"))
    assert message.startswith("the Flax side must run on its inputs, got ValueError in blocks.1.")
    assert re.search(r"blocks\.1\.conv \(Conv, line \d+ of _conv\.py\)", message)
    assert "inputs (2, 6, 6, 4)" in message
    assert "in_channels=5" in message
    assert "\n" not in message


class Through(nnx.Module):
    def __init__(self) -> None:
        self.blocks = nnx.List([norms.LayerNorm(4), Block(5)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def test_an_error_inside_a_torch_model_names_the_submodule() -> None:
    message = refusal(lambda: parity.compare(Through(), TorchNested(5), IMAGES, layout="image"))
    assert message.startswith("the PyTorch side must run on its inputs, got RuntimeError in ")
    assert re.search(r"blocks\.1\.conv \(Conv2d, line \d+ of conv\.py\)", message)
    assert "expected input[2, 4, 6, 6] to have 5 channels" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (lambda x: x @ jnp.ones((7, 2)), torch.clone, "the Flax side .* TypeError in the function"),
        (
            lambda x: x,
            lambda x: x @ torch.ones(7, 2, dtype=x.dtype),
            "the PyTorch side .* RuntimeError in the function",
        ),
        (lambda _: 1 // 0, torch.clone, "ZeroDivisionError in the function"),
        (jnp.add, torch.clone, "TypeError in the function with inputs .8, 4.: .*argument"),
    ],
    ids=["flax", "torch", "python", "arguments"],
)
def test_an_error_inside_a_function_names_the_side(
    ours: Callable[..., object], theirs: Callable[..., object], words: str
) -> None:
    message = refusal(lambda: parity.compare(ours, theirs, X))
    assert re.search(words, message)
    assert "Check the model alone, the inputs' shapes and layout='image'." in message


def layer(bias: bool = True) -> norms.LayerNorm:
    return norms.LayerNorm(4, bias=bias)


def torch_layer(bias: bool = True) -> torch.nn.LayerNorm:
    return torch.nn.LayerNorm(4, bias=bias)


@pytest.mark.parametrize(
    ("ours", "theirs", "weights", "words"),
    [
        (layer(), torch_layer(False), "torch", "1 missing: bias"),
        (layer(False), torch_layer(), "torch", "1 unexpected: bias"),
        (layer(), torch_layer(False), "flax", r"got bias \(4,\) for none"),
        (layer(False), torch_layer(), "flax", "got none for bias"),
        (
            linear.Linear(4, 5, rngs=RNGS),
            torch.nn.Linear(4, 4),
            "torch",
            r"2 mismatched: weight \(4, 4\) for \(5, 4\)",
        ),
        (
            linear.Linear(4, 5, rngs=RNGS),
            torch.nn.Linear(4, 4),
            "flax",
            r"got weight \(5, 4\) for \(4, 4\)",
        ),
        (lambda x: x, torch_layer(), "torch", "a function has no parameters, got .* weight, bias"),
        (layer(), torch.clone, "torch", "2 missing: weight, bias"),
        (layer(), torch_layer, "torch", "2 missing: weight, bias"),
        (norms.LayerNorm, torch_layer(), "torch", "Pass an instance"),
    ],
    ids=[
        "missing", "unexpected", "flax: unexpected", "flax: missing", "shape", "flax: shape",
        "function", "torch function", "torch class", "flax class",
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    ours: object, theirs: object, weights: str, words: str
) -> None:
    message = refusal(lambda: parity.compare(ours, theirs, X, weights=weights))
    assert re.search(words, message)
    assert re.search(r"Give both|Compare it with a Flax module|Pass an instance", message)


Function = Callable[[object], object]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (lambda x: (x, x), lambda x: x, r"output\[0\], output\[1\] from Flax and output from"),
        (lambda x: x, lambda x: (x, x), r"output from Flax and output\[0\], output\[1\] from"),
        (
            lambda x: (x, x),
            lambda x: {"a": x, "b": x},
            r"output\[1\] from Flax and output\['a'\], output\['b'\] from PyTorch\. Wrap one",
        ),
        (lambda x: x[:2], lambda x: x, r"got output \(2, 4\) from Flax .* and \(8, 4\) from"),
        (lambda x: x.sum(), lambda x: x.sum(0), r"got output \(\) from Flax .* and \(4,\) from"),
    ],
    ids=["one for two", "two for one", "dict", "shape", "scalar"],
)
def test_other_structures_and_shapes_are_refused(
    ours: Function, theirs: Function, words: str
) -> None:
    assert re.search(words, refusal(lambda: parity.compare(ours, theirs, X)))


def test_a_forgotten_layout_is_named() -> None:
    def ours(x: jax.Array) -> jax.Array:
        return x.mean((1, 2))

    def theirs(x: Tensor) -> Tensor:
        return x.mean((2, 3))

    assert parity.compare(ours, theirs, IMAGES, layout="image").passed
    words = "(2, 6) from PyTorch. For images pass layout='image'."
    assert words in refusal(lambda: parity.compare(ours, theirs, IMAGES))
    conv = linear.Conv(4, 4, 3, rngs=RNGS)
    message = refusal(lambda: parity.compare(conv, torch.nn.Conv2d(4, 4, 3), IMAGES))
    assert message.endswith("layout='image'.")


def same(x: object) -> object:
    return x


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parity.compare(same, same, X, layout="NCHW"), "layout must be 'image' or None"),
        (lambda: parity.compare(same, same, X, weights="jax"), "weights must be 'torch', 'flax'"),
        (lambda: parity.compare(same, same, X, dtypes=(np.int32,)), "dtypes must be a sequence"),
        (lambda: parity.compare(same, same, X, dtypes=("float64",)), "dtypes must be a sequence"),
        (lambda: parity.compare("a", same, X), "flax_side must be an nnx.Module, .* of str"),
        (lambda: parity.compare(same, "a", X), "torch_side must be a torch.nn.Module .* of str"),
        (lambda: parity.compare(same, same, X, witness="a"), "a torch.nn.Module .* of str"),
        (lambda: parity.compare(same, same, "abc"), "the Flax side must run on its inputs"),
        (lambda: parity.compare(layer(), torch_layer()), "missing 1 required positional argument"),
        (
            lambda: parity.compare(layer(), torch_layer(), X, witness=torch.nn.Linear(4, 4)),
            r"must fit the PyTorch module, got weight \(4,\) for \(4, 4\)",
        ),
    ],
    ids=[
        "layout", "weights", "dtypes", "wide", "flax side", "torch side", "witness",
        "input", "no input", "witness of other weights",
    ],
)  # fmt: skip
def test_an_argument_that_means_nothing_is_refused(call: Callable[[], object], words: str) -> None:
    assert re.search(words, refusal(call))


def test_a_linen_module_needs_its_variables() -> None:
    message = refusal(lambda: parity.compare(flax.linen.Dense(4), torch.nn.Linear(4, 4), X))
    assert message.endswith("Pass parity.Linen(module, variables).")


def total(model: Callable[..., Tensor], _: object, x: Tensor) -> Tensor:
    return model(x).sum()


def total_of_three(model: Callable[..., Tensor], _: object, x: Tensor) -> Tensor:
    return model(x[:, :3]).sum()


OURS = parity.TrainStep(layer(), lambda m: nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param), total)
THEIRS = parity.TrainStep(torch_layer(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1), total)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parity.compare(OURS, torch_layer(), X), "of a TrainStep must be one, too"),
        (lambda: parity.compare(layer(), THEIRS, X), "torch_side must be .* got TrainStep"),
        (lambda: parity.compare(OURS, THEIRS, X, witness=same), "TrainStep must be one, too"),
        (lambda: parity.compare(THEIRS, OURS, X), "flax_side.model must be an nnx.Module"),
        (
            lambda: parity.compare(OURS, THEIRS._replace(model=same), X),
            "torch_side.model must be a torch.nn.Module",
        ),
        (
            lambda: parity.compare(OURS, THEIRS._replace(optimizer=same), X),
            "torch_side.optimizer must make one torch.optim.Optimizer",
        ),
        (
            lambda: parity.compare(OURS, THEIRS._replace(step=total_of_three), X),
            r"the PyTorch side must run .* in the model \(LayerNorm, line",
        ),
        (lambda: parity.trajectory(OURS, THEIRS, [], steps=3), "batches must hold at least one"),
        (lambda: parity.trajectory(OURS, THEIRS, [[X]], steps=0), "steps must be an integer of"),
        (
            lambda: parity.trajectory(OURS, THEIRS, [[X]], steps=3, dtypes=(jnp.bfloat16,)),
            "dtypes of training steps must be float32",
        ),
    ],
    ids=[
        "module", "one side", "witness", "swapped", "torch model", "torch optimizer",
        "torch step", "no batches", "no steps", "dtypes",
    ],
)  # fmt: skip
def test_a_training_step_beside_something_else_is_refused(
    call: Callable[[], object], words: str
) -> None:
    assert re.search(words, refusal(call))


def torch_sgd(params: list[torch.nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parity.compare(optax.sgd(0.1), torch_sgd), r"initial parameters, .* inputs=\[\]"),
        (lambda: parity.compare(optax.sgd(0.1), torch_sgd, np.arange(3)), r"inputs=\['int64'\]"),
        (lambda: parity.compare(optax.sgd(0.1), "sgd", X), "Pass lambda ps: torch.optim.AdamW"),
        (
            lambda: parity.compare(optax.sgd(0.1), torch_sgd, X, witness=3),
            "must make a torch.optim.Optimizer",
        ),
    ],
    ids=["no parameters", "integers", "a string", "witness"],
)
def test_an_optimizer_without_parameters_or_twin_is_refused(
    call: Callable[[], object], words: str
) -> None:
    assert re.search(words, refusal(call))
