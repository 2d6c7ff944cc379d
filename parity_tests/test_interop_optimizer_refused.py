"""States of optimizers that ``flaxstab.interop`` refuses, with nothing changed."""

from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, optim
from parity_tests.test_interop_optimizer_edges import (
    NAMES,
    StateDict,
    Two,
    adam_state,
    params_of,
    torch_two,
)

T = torch.nn


def sgd_state(**options: object) -> StateDict:
    module = torch_two()
    optimizer = torch.optim.SGD(module.parameters(), **options)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def state_of(kind: type[torch.optim.Optimizer], steps: int = 1) -> StateDict:
    module = torch_two()
    optimizer = kind(module.named_parameters())
    for _ in range(steps):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer.state_dict()


def change(function: Callable[[StateDict], object]) -> StateDict:
    state = adam_state()
    function(state)
    return state


def without_names(state: StateDict) -> None:
    del state["param_groups"][0]["param_names"]


def in_groups(state: StateDict) -> None:
    state["param_groups"] = [{"params": [0]}, {"params": [1, 2]}]


ADAMW = optim.adamw()
BAD: dict[str, tuple[Callable[[], StateDict], dict[str, object], str]] = {
    "no state_dict": (lambda: {"lr": 1}, {}, r"of a torch.optim.Optimizer, got keys=\['lr'\]"),
    "a model's": (lambda: {"w": np.ones(1)}, {}, "Pass optimizer.state_dict()"),
    "no groups": (lambda: change(lambda s: s.update(param_groups=3)), {}, "must be groups with p"),
    "no names": (
        lambda: change(without_names),
        {},
        r"Pass names=\[n for n, _ in module.named_parameters\(\)\]",
    ),
    "too few names": (
        lambda: change(without_names),
        {"names": NAMES[:2]},
        "names must be one for each parameter of the group, in its order, got group=0 and names=2",
    ),
    "names twice": (
        lambda: change(without_names),
        {"names": [NAMES[0]] * 3},
        "must have a name of its own, got parameters=3 and names=1",
    ),
    "one list for two groups": (
        lambda: change(in_groups),
        {"names": NAMES},
        "names must be a list for each group: with several, their order is not the module's",
    ),
    "other names than the state's": (
        adam_state,
        {"names": NAMES[::-1]},
        r"names must be those that the groups hold, got groups=\[0\]",
    ),
    "names of another model": (
        adam_state,
        {"rename": lambda name: f"net.{name}"},
        r"must be tensors of the model, got unknown=\['net.first.weight'",
    ),
    "a parameter that no group has": (
        lambda: change(lambda s: s["param_groups"][0].update(params=[0, 1], param_names=NAMES[:2])),
        {},
        r"the state must be of parameters in param_groups, got of=\[2\]",
    ),
    "fewer parameters": (
        lambda: change(
            lambda s: (
                s["param_groups"][0].update(params=[0, 1], param_names=NAMES[:2]),
                s["state"].pop(2),
            )
        ),
        {},
        r"must hold every parameter of the optimizer, got left_out=\['second.kernel'\]",
    ),
    "a missing moment": (
        lambda: change(lambda s: s["state"][0].pop("exp_avg")),
        {},
        r"of the same kind, with the same options, got tensor='first.weight' and torch=",
    ),
    "amsgrad": (lambda: adam_state(amsgrad=True), {}, "must have the same options as the one here"),
    "SGD's": (
        lambda: sgd_state(momentum=0.9),
        {"names": NAMES},
        "torch's optimizer must be Adam or AdamW, whose options have amsgrad, got group=0",
    ),
    "another shape": (
        lambda: change(lambda s: s["state"][0].update(exp_avg=torch.ones(2, 3))),
        {},
        r"exp_avg must have the tensor's shape, got tensor='first.weight' and shape=\(2, 3\)",
    ),
    "half a step": (
        lambda: change(lambda s: s["state"][0].update(step=torch.tensor(1.5))),
        {},
        "step must be one whole number of at least 0 and at most 2147483647, got tensor='first",
    ),
    **{
        f"a step of {step}": (
            lambda step=step: change(lambda s: s["state"][0].update(step=step)),
            {},
            "step must be one whole number of at least 0 and at most 2147483647, got tensor='first",
        )
        for step in (torch.tensor(3e38), float("inf"), float("nan"), -1, "3", [3.0], 2**31)
    },
    **{
        f"a square of {value}": (
            lambda value=value: change(lambda s: s["state"][1]["exp_avg_sq"].fill_(value)),
            {},
            "exp_avg_sq must hold finite numbers of at least 0, got tensor='first.bias' and least=",
        )
        for value in (-1e-9, float("inf"), float("nan"))
    },
    "a moment of words": (
        lambda: change(lambda s: s["state"][1].update(exp_avg=["a", "b", "c"])),
        {},
        "exp_avg must hold real numbers, got tensor='first.bias'",
    ),
    "a state that is a list": (
        lambda: change(lambda s: s["state"].update({1: [1.0]})),
        {},
        r"the state of a parameter must be a mapping, got of=\[1\]",
    ),
    "params that are a number": (
        lambda: change(lambda s: s["param_groups"][0].update(params=3)),
        {},
        "param_groups must be groups with params, a list of numbers or names",
    ),
    "params of lists": (
        lambda: change(lambda s: s["param_groups"][0].update(params=[[0]])),
        {},
        "param_groups must be groups with params, a list of numbers or names",
    ),
    "names that are one string": (
        lambda: change(without_names),
        {"names": "abc"},
        "names must be a list of strings, or such a list for each group, got names='str'",
    ),
    "names of numbers": (
        lambda: change(without_names),
        {"names": [1, 2, 3]},
        "names must be a list of strings, or such a list for each group, got names='list'",
    ),
    "a huge count": (adam_state, {"count": 2**31}, "count must be an integer of at least every"),
    "RAdam's": (
        lambda: state_of(torch.optim.RAdam),
        {},
        "torch's optimizer must be Adam or AdamW, whose options have amsgrad, got group=0",
    ),
    "RAdam's before its first step": (
        lambda: state_of(torch.optim.RAdam, steps=0),
        {},
        "torch's optimizer must be Adam or AdamW, whose options have amsgrad, got group=0",
    ),
    "SGD's before its first step": (
        lambda: state_of(torch.optim.SGD, steps=0),
        {},
        "torch's optimizer must be Adam or AdamW, whose options have amsgrad, got group=0",
    ),
    "steps apart": (
        lambda: change(lambda s: s["state"][0].update(step=torch.tensor(2.0))),
        {},
        r"every parameter must be at the same step, that of count, got count=3 and not_there=",
    ),
}


@pytest.mark.parametrize(("make", "given", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    make: Callable[[], StateDict], given: dict[str, object], message: str
) -> None:
    model = Two()
    optimizer = nnx.Optimizer(model, ADAMW, wrt=nnx.Param)
    with pytest.raises(ValueError, match=message) as refused:
        interop.load_optimizer_state_dict(optimizer, model, make(), **given)
    assert "\n" not in str(refused.value)
    assert int(optimizer.step[...]) == int(optimizer.opt_state.count[...]) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nnx.as_pure(optimizer.opt_state)))


@pytest.mark.parametrize(
    ("tx", "momentum"),
    [(optim.sgd(momentum=0.9), 0.9), (optim.sgd(), 0.0), (optax.sgd(lambda _: 0.1), 0.0)],
)
def test_sgd_must_be_told_how_many_updates_there_were(
    tx: optax.GradientTransformation, momentum: float
) -> None:
    model, state = Two(), sgd_state(momentum=momentum)
    with pytest.raises(ValueError, match="torch's SGD keeps no step number"):
        interop.load_optimizer_state_dict(tx.init(params_of(model)), model, state, names=NAMES)


TORCHLESS: dict[str, tuple[Callable[[], optax.GradientTransformation], str]] = {
    "optax.amsgrad": (
        lambda: optax.amsgrad(0.1),
        "got of=.'ScaleByAmsgradState'.. optax.amsgrad k",
    ),
    "rmsprop": (lambda: optax.rmsprop(0.1), "must be one that torch.optim.Adam, AdamW or SGD has"),
    "lion": (lambda: optax.lion(0.1), "must be one that torch.optim.Adam, AdamW or SGD has too"),
    "an average called norm": (lambda: optax.ema(0.9), "got of=.'ema.norm.kernel"),
    "accumulation": (
        lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        "must be one that torch.optim.Adam, AdamW or SGD has too",
    ),
    "Adam twice": (
        lambda: optax.chain(optax.adam(0.1), optax.adam(0.1)),
        "a parameter must have one moment of a kind",
    ),
}


class Named(nnx.Module):
    def __init__(self) -> None:
        self.norm = linear.Linear(1, 1, bias=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("make", "message"), TORCHLESS.values(), ids=TORCHLESS)
def test_a_state_for_which_torch_has_no_place_is_refused(
    make: Callable[[], optax.GradientTransformation], message: str
) -> None:
    model = Named()
    state = make().init(params_of(model))
    groups = [{"params": [0], "param_names": ["norm.weight"]}]
    with pytest.raises(ValueError, match=message):
        interop.optimizer_state_dict(state, model, param_groups=groups)
    with pytest.raises(ValueError, match=message):
        interop.load_optimizer_state_dict(state, model, {"state": {}, "param_groups": groups})


def test_exporting_needs_every_parameter_in_the_groups() -> None:
    model = Two()
    state = optim.adamw().init(params_of(model))
    groups = [{"params": [0, 1], "param_names": NAMES[:2]}]
    with pytest.raises(ValueError, match=r"got left_out=\['second.kernel'\]"):
        interop.optimizer_state_dict(state, model, param_groups=groups)


def test_the_options_of_another_optimizer_are_refused_on_the_way_out() -> None:
    model = Two()
    state = optim.adamw().init(params_of(model))
    options = {
        kind: kind(torch_two().named_parameters()).state_dict()["param_groups"]
        for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam, torch.optim.SGD)
    }
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        interop.optimizer_state_dict(state, model, param_groups=options[kind])
    for kind in (torch.optim.RAdam, torch.optim.SGD):
        with pytest.raises(ValueError, match="torch's optimizer must be Adam or AdamW, whose opt"):
            interop.optimizer_state_dict(state, model, param_groups=options[kind])
    groups = [{**options[torch.optim.Adam][0], "amsgrad": True}]
    with pytest.raises(ValueError, match="must have the same options as the one here, got group=0"):
        interop.optimizer_state_dict(state, model, param_groups=groups)
    state = optim.sgd(momentum=0.9).init(params_of(model))
    interop.optimizer_state_dict(state, model, param_groups=options[torch.optim.SGD])
    muon = [{"params": [0, 1, 2], "param_names": NAMES, "momentum": 0.9, "ns_steps": 5}]
    with pytest.raises(ValueError, match="torch's optimizer must be SGD, whose options have dampe"):
        interop.optimizer_state_dict(state, model, param_groups=muon)


@pytest.mark.parametrize("give", [iter, tuple, lambda pairs: (n for n, _ in pairs)])
def test_names_may_be_pairs_or_a_generator(give: Callable[[object], object]) -> None:
    model, tx = Two(), optim.adamw()
    state = change(without_names)
    found = interop.load_optimizer_state_dict(
        tx.init(params_of(model)), model, state, names=give(torch_two().named_parameters())
    )
    again = interop.load_optimizer_state_dict(
        tx.init(params_of(model)), model, state, names=[give(torch_two().named_parameters())]
    )
    named = interop.load_optimizer_state_dict(tx.init(params_of(model)), model, adam_state())
    for leaves in zip(*map(jax.tree.leaves, (found, again, named)), strict=True):
        assert np.array_equal(leaves[0], leaves[2])
        assert np.array_equal(leaves[1], leaves[2])
