"""The harness finds what is planted in either side, and nothing where nothing is planted."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import jax
import numpy as np
import pytest

from flaxstab import functional
from flaxstab.parity import _selftest
from flaxstab.parity._evidence import Evidence
from flaxstab.parity._selftest._limits import LIMITS
from flaxstab.parity._selftest._look import Seen, _outside, look
from flaxstab.parity._selftest._plant import Fault, Plant, argument, replaced, result
from flaxstab.parity._selftest._run import FAULTS, cases, run
from flaxstab.parity._selftest._table import Clean, Outcome, Table

ALL = (*FAULTS, *LIMITS)
PLANTS = [
    pytest.param(plant, id=f"{fault.name}-{side}")
    for fault in ALL
    for side, plant in fault.plants.items()
]
GELU = next(fault for fault in FAULTS if fault.name == "tanh GELU")


def test_every_planted_fault_is_found_and_sound_code_passes() -> None:
    table = run()
    assert table.passed, str(table)
    assert len(table.outcomes) == len(ALL)
    assert {case.case for case in table.clean} == set(cases())
    assert {outcome.side for outcome in table.outcomes} == {"jax", "torch"}
    # The bounds are as tight as they must be: ten times wider ones would miss faults.
    assert min(outcome.excess for outcome in table.required) < 10
    # A limit that is seen is none: it belongs among the faults.
    assert [o.fault.name for o in table.outcomes if o.fault.limit and o.kinds] == []


def test_every_kind_of_check_is_needed_for_some_fault() -> None:
    heads = {fault.check.split(" ")[0] for fault in FAULTS}
    assert {"output", "grad", "step", "evaluation", "update", "loss", "buffer", "law"} <= heads
    assert len(FAULTS) >= 40


def test_faults_have_names_of_their_own_and_a_case() -> None:
    assert len({fault.name for fault in ALL}) == len(ALL)
    assert {fault.case for fault in ALL} == set(cases())
    one_side = [fault.name for fault in ALL if len(fault.plants) < 2]
    assert one_side == ["input changed in place"]  # JAX's arrays cannot be


def _owners() -> list[object]:
    """Returns every module and class that something is planted in."""
    names = [n for n in sys.modules if n.startswith("flaxstab.") and "_selftest" not in n]
    names += ["flaxstab.parity._selftest._cases_training", "torch_ref.functional"]
    names += ["torch_ref.dropout"]
    names += ["jax.nn", "flax.nnx", "optax", "torch.nn", "torch.nn.functional", "torch.nn.init"]
    names += ["torch.nn.modules.batchnorm", "torch.nn.utils", "torch.nn.utils.clip_grad"]
    names += ["torch.optim", "torch.optim.adam", "torch.optim.sgd", "torch.optim.lr_scheduler"]
    modules = [import_module(name) for name in names]
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type)]
    return [*modules, *dict.fromkeys(classes)]


def _functions() -> dict[tuple[int, str], object]:
    return {
        (id(owner), name): value
        for owner in _owners()
        for name, value in vars(owner).items()
        if callable(value) and not isinstance(value, ModuleType)
    }


def _changed(before: dict[tuple[int, str], object]) -> int:
    after = _functions()
    return sum(after[key] is not value for key, value in before.items())


@pytest.mark.parametrize("plant", PLANTS)
def test_a_plant_changes_a_function_and_is_undone(plant: Plant) -> None:
    before = _functions()
    with plant():
        assert _changed(before) in (1, 2)  # one fault takes two
    assert _changed(before) == 0
    with pytest.raises(RuntimeError, match="stop"), plant():
        raise RuntimeError("stop")
    assert _changed(before) == 0


class Sample:
    """Something to plant in."""

    def twice(self, x: int, factor: int = 2) -> int:
        return factor * x


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda: replaced(Sample, "twice", lambda f: lambda self, x: f(self, x) + 1), 7),
        (lambda: argument(Sample, "twice", factor=lambda factor: factor + 3), 15),
        (lambda: argument(Sample, "twice", x=lambda x: -x), -6),
        (lambda: result(Sample, "twice", lambda y: 10 * y), 60),
    ],
    ids=["replaced", "default argument", "argument", "result"],
)
def test_a_function_is_faulty_inside_the_block_alone(
    plant: Callable[[], AbstractContextManager[None]], expected: int
) -> None:
    with plant():
        assert Sample().twice(3) == expected
    assert Sample().twice(3) == 6


def test_a_plant_in_a_class_that_inherits_the_function_is_refused() -> None:
    class Child(Sample):
        pass

    with pytest.raises(KeyError, match="twice"), replaced(Child, "twice", lambda f: f):
        pass


def _gelu_fault(check: str, plant: Plant | None = nullcontext, limit: str = "") -> Fault:
    return Fault("a fault", "a claim", "gelu", check, plant, None, limit)


def test_a_fault_that_is_not_planted_is_not_found() -> None:
    table = run(faults=[_gelu_fault("output")])
    assert not table.passed
    assert [outcome.found for outcome in table.outcomes] == [False]
    assert "not found: a fault (jax)\nfaults found 0/1" in str(table)
    assert "MISSED: output" in str(table)


def test_a_fault_must_be_found_by_the_check_that_is_meant() -> None:
    table = run(faults=[_gelu_fault("step 1", GELU.jax)])
    assert table.outcomes[0].kinds >= {"output", "input gradient"}
    assert not table.outcomes[0].found


def test_a_limit_need_not_be_seen_and_is_told_when_it_is() -> None:
    unseen, seen = (
        run(faults=[_gelu_fault("output", plant, "it is small")])
        for plant in (nullcontext, GELU.jax)
    )
    assert unseen.passed
    assert "limit: a fault (jax): it is small" in str(unseen)
    assert "limit: a fault (jax): seen by now, so no limit any more" in str(seen)
    assert "faults found 0/0" in str(seen)


def test_a_comparison_that_is_refused_finds_no_fault() -> None:
    def crop(x: jax.Array) -> jax.Array:
        return x[:2]

    def plant() -> AbstractContextManager[None]:
        return replaced(functional, "gelu", lambda _: crop)

    (outcome,) = run(faults=[_gelu_fault("output", plant)]).outcomes
    assert (outcome.verdict, outcome.found) == ("refused", False)
    assert outcome.excess == 0.0


def _outcome(side: str, named: str, *, caught: str = "output") -> Outcome:
    return Outcome(GELU, side, "semantics_differ", named, caught, frozenset(["output"]), 9.0, 0.1)


QUIET = Clean("gelu", (), 0.1)


@pytest.mark.parametrize(
    ("table", "passed", "line"),
    [
        (Table((_outcome("jax", "jax"),), (QUIET,)), True, "side named rightly 1/1"),
        (Table((_outcome("jax", "torch"),), (QUIET,)), False, "(jax, named torch)"),
        (Table((_outcome("torch", ""),), (QUIET,)), False, "(torch, named none)"),
        (Table((_outcome("jax", "jax", caught=""),), (QUIET,)), False, "faults found 0/1"),
        (
            Table((_outcome("jax", "jax"),), (Clean("gelu", ("output",), 3.0),)),
            False,
            "false alarm: gelu: output",
        ),
    ],
    ids=["sound", "wrong side", "no side", "missed", "false alarm"],
)
def test_the_table_passes_only_without_misses_and_alarms(
    table: Table, passed: bool, line: str
) -> None:
    assert table.passed is passed
    assert line in str(table)


def test_one_wrong_side_in_a_hundred_is_allowed() -> None:
    right = (_outcome("jax", "jax"),) * 99
    assert Table((*right, _outcome("jax", "")), (QUIET,)).passed
    assert not Table((*right[1:], _outcome("jax", "")), (QUIET,)).passed


def test_the_table_shows_the_error_with_and_without_the_fault_in_one_line() -> None:
    lines = str(Table((_outcome("jax", "jax"),), (QUIET,))).splitlines()
    assert lines[0].split()[-2:] == ["excess", "clean"]
    assert lines[1].split()[-2:] == ["9", "0.1"]
    assert "seen by: a output (1)" in lines


@pytest.fixture
def _nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flaxstab.parity._selftest._run.look", lambda *_: Seen("agree", "", ()))


def _sides(seed: int, side: str) -> list[str]:
    sound = Fault("a fault", "a claim", "gelu", "output", nullcontext, nullcontext)
    many = [sound._replace(name=f"fault {n}") for n in range(20)]
    return [outcome.side for outcome in run(seed, side, faults=many).outcomes]


@pytest.mark.usefixtures("_nothing_is_compared")
def test_sides_are_drawn_by_the_seed() -> None:
    assert set(_sides(0, "random")) == {"jax", "torch"}
    assert _sides(0, "random") == _sides(0, "random") != _sides(1, "random")
    assert _sides(0, "both") == ["jax", "torch"] * 20
    assert _sides(0, "torch") == ["torch"] * 20


@pytest.mark.usefixtures("_nothing_is_compared")
def test_a_fault_that_a_side_cannot_have_is_listed() -> None:
    table = run(side="torch", faults=[_gelu_fault("output")])
    assert table.outcomes == ()
    assert "left out, for that side cannot have it: a fault" in str(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "left"}, "side must be 'jax', 'torch', 'both' or 'random', got side='left'"),
        ({"only": ["nothing"]}, "only must be the name of a fault, got only='nothing'"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_case_is_built_anew_each_time() -> None:
    for name, build in cases().items():
        first, second = build(), build()
        assert first is not second, name
        assert first[0] is not second[0], name


def test_samples_that_are_no_numbers_are_far_outside_their_bound() -> None:
    evidence = Evidence("mean", float("nan"), (0.0, 1.0), 10, 0.1, 1e-6, 1e-6, "NaN samples: 1")
    assert _outside(evidence) == np.inf
    assert _outside(evidence._replace(statistic=0.75)) == 0.5
    assert _outside(evidence._replace(statistic=1.5)) == 2.0


def test_a_clean_case_is_quiet() -> None:
    seen = look(cases()["gelu"]())
    assert (seen.verdict, seen.side) == ("agree", "")
    assert seen.excess < 1
    assert _selftest.run is run
