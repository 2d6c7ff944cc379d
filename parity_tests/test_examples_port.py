"""``examples/port_a_model.py``: layers agree, the curve carries on, and faults are noticed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import port_a_model as example

from flaxstab import parity

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "LAYERS", (1,))
    monkeypatch.setattr(example, "WIDTH", 4)
    monkeypatch.setattr(example, "BATCH", 8)
    monkeypatch.setattr(example, "LOCATED", (2, 5, 5, 3))


def test_a_model_is_ported_and_trains_on(tmp_path: Path, capsys: Captured) -> None:
    assert example.main(["--steps", "4", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "The loss curve carries on" in printed
    assert "no layer differs" in printed
    assert "layer1.0.conv1" in printed
    assert (tmp_path / "loss_curve.png").stat().st_size > 0


def test_lost_moments_and_a_layer_that_differs_end_in_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(example.interop, "load_optimizer_state_dict", lambda *_, **__: None)
    monkeypatch.setattr(example, "located", lambda _: parity.Location(()))
    options = ["--steps", "3", "--output", str(tmp_path)]
    assert example.main(options) == 1
    assert "does NOT carry on" in capsys.readouterr().out
    monkeypatch.undo()
    bad = parity.Location((), "bn1", "forward")
    monkeypatch.setattr(example, "located", lambda _: bad)
    losses = example.Continued(*(np.ones(2), np.ones(2), np.zeros(2)))
    monkeypatch.setattr(example, "continued", lambda *_: (losses, ""))
    assert example.main(options) == 1


def test_the_ratio_is_that_of_the_largest_distances() -> None:
    after = example.Continued(np.array([1.0, 2.0]), np.array([1.0, 2.125]), np.array([2.0, 2.0]))
    assert after.ratio == 0.125
    assert not after.carries_on
    assert not after._replace(jax=np.array([np.nan, 2.0])).carries_on


def test_the_statistics_are_random() -> None:
    one, other = (example.torch_model(seed).bn1.running_mean for seed in (0, 1))
    assert not torch.equal(one, other)


def test_what_is_wrong_is_said_in_one_line(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main(["--steps", "1"])
    assert stop.value.code == 2
    assert "must be a whole number from 2 to 10000, got 1" in capsys.readouterr().err
