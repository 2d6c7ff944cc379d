"""Faults of one layer: which are planted where, how they are judged, and what is written."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import cli, linear
from flaxstab.parity import _selftest
from flaxstab.parity._selftest._instances import (
    _MARK,
    Instances,
    Planted,
    _faulty,
    plan,
    run_instances,
)
from flaxstab.parity._selftest._mistakes import _changing, mistakes
from flaxstab.parity._selftest._networks import networks
from flaxstab.parity._selftest._page import page
from flaxstab.parity._selftest._sweep import Sweep
from flaxstab.parity._selftest._table import Clean, Outcome, Table

COMMAND = ["parity", "selftest"]


def test_every_network_gets_faults_of_every_kind_of_its_layers_in_both_directions() -> None:
    planned = plan(0, None)
    assert {p.network for p in planned} == set(networks())
    assert len(planned) >= 50
    for network in networks():
        here = [p for p in planned if p.network == network]
        assert {p.mistake.direction for p in here} == {"forward", "backward"}
        assert len({p.kind for p in here}) >= 2
        assert {p.side for p in here} == {"jax", "torch"}
    assert {p.mistake.name for p in planned} == {m.name for m in mistakes()}


def test_layers_and_sides_are_drawn_by_the_seed() -> None:
    drawn = [[(p.layer, p.side) for p in plan(seed, 3)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 3 * len(networks())


def test_only_the_marked_layer_makes_the_mistake() -> None:
    layers = [linear.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2)]
    setattr(layers[0], _MARK, True)
    x = np.ones((1, 2), np.float32)
    plain = layers[1](x)
    twice = _changing(lambda y: 2 * y)
    with _faulty(linear.Linear, "__call__", twice):
        copied = nnx.clone(layers[0])
        assert np.array_equal(copied(x), 2 * plain)
        assert np.array_equal(jax.jit(copied)(x), 2 * plain)
        assert np.array_equal(layers[1](x), plain)
    assert np.array_equal(layers[0](x), plain)
    module = torch.nn.Linear(2, 2)
    before = module(torch.ones(1, 2))
    setattr(module, _MARK, True)
    with _faulty(torch.nn.Linear, "forward", twice):
        assert torch.equal(module(torch.ones(1, 2)), 2 * before)
    assert torch.equal(module(torch.ones(1, 2)), before)


def found(named: str = "jax", layer: str = "bn1", direction: str = "forward") -> Planted:
    return Planted("a", "net", "bn1", "forward", "jax", True, named, layer, direction, 3.0)


@pytest.mark.parametrize(
    ("planted", "alarms", "passed"),
    [
        ((found(),), (), True),
        ((found(),), ("net",), False),
        ((found(named="torch"),), (), False),
        ((found(layer="conv1"),), (), False),
        ((found(direction="backward"),), (), False),
        ((found()._replace(found=False),), (), False),
        ((*[found()] * 19, found(layer="conv1")), (), True),
        ((*[found()] * 18, found(layer="conv1")), (), False),
    ],
)
def test_the_layer_must_be_right_in_95_of_100(
    planted: tuple[Planted, ...], alarms: tuple[str, ...], passed: bool
) -> None:
    assert Instances(planted, alarms).passed is passed


def test_one_layer_of_the_perceptron_is_named_on_either_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = {"MLP, layer norm": networks()["MLP, layer norm"]}
    monkeypatch.setattr("flaxstab.parity._selftest._instances.networks", lambda: only)
    wanted = ("layer norm eps 1.1e-5", "gradient 1 % too large")
    few = [m for m in mistakes() if m.name in wanted]
    monkeypatch.setattr("flaxstab.parity._selftest._instances.mistakes", lambda: few)
    table = run_instances(0)
    assert len(table.planted) == 2
    assert table.passed, str(table)


def some() -> tuple[Table, Instances]:
    fault = _selftest.FAULTS[0]
    seen = frozenset(["output"])
    outcome = Outcome(fault, "jax", "semantics_differ", "jax", "output", seen, 9.0, 0.1)
    return Table((outcome,), (Clean("gelu", (), 0.1),)), Instances((found(),), ())


def test_the_page_shows_each_fault_by_check_and_each_layer() -> None:
    text = page(*some(), "a command")
    assert "This page is written by `a command`." in text
    assert f"| {_selftest.FAULTS[0].name} |" in text
    assert "| a | net | bn1 | jax | jax | bn1 forward | 3 |" in text
    assert "- layer and direction named rightly 1/1" in text


def test_the_command_writes_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, layers = some()
    monkeypatch.setattr(_selftest, "run", lambda *_, **__: table)
    monkeypatch.setattr(_selftest, "run_instances", lambda *_, **__: layers)
    target = tmp_path / "page.md"
    assert cli.main([*COMMAND, "--write", str(target)]) == 0
    assert target.read_text().startswith("# What the harness finds")
    assert cli.main([*COMMAND, "--write", str(tmp_path / "none" / "page.md")]) == 2


def test_a_sweep_writes_what_was_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = Sweep("gelu", 8, (), 0.5, "output in float32")
    monkeypatch.setattr(_selftest, "sweep", lambda *_: iter([result]))
    target = tmp_path / "sweep.json"
    assert cli.main([*COMMAND, "--sweep", "2", "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert written["seeds"] == 2
    assert written["cases"][0]["comparisons"] == 8
