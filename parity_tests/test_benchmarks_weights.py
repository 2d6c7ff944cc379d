"""``benchmarks/weights_peers.py`` passes what agrees, and notices a bit and a wrong gradient."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import weights_peers  # noqa: E402

EXACT = np.array([1.0, -2.0])
NEAR = EXACT + 1e-7


def found(near: np.ndarray = NEAR) -> dict[str, np.ndarray]:
    """Returns what PyTorch's side writes."""
    return {"logits 64": EXACT, "logits 32": near, "grad64 w": EXACT, "grad32 w": near}


def row(logits: np.ndarray, gradient: np.ndarray) -> dict[str, object]:
    low = weights_peers._distances(32, logits, {"w": gradient}, found(), None)
    high = weights_peers._distances(64, EXACT, {"w": EXACT}, found(), None)
    return {"accounted for": True, "round trip": True, **low, **high}


def test_errors_up_to_twice_pytorchs_pass() -> None:
    passing = row(EXACT - 1.9e-7, EXACT - 1.9e-7)
    assert weights_peers._passed(passing)
    assert passing["gradients above"] == "0 of 1"
    assert not weights_peers._passed(row(EXACT - 2.1e-7, NEAR))
    one = row(np.array([1 + 1e-6, -2.0]), NEAR)
    assert not one["largest logit within"]
    assert not weights_peers._passed(one)
    wrong = row(NEAR, EXACT - 1e-6)
    assert not weights_peers._passed(wrong)
    assert wrong["gradients above"] == "1 of 1"
    assert not weights_peers._passed(passing | {"logits 64": 1e-11})
    assert not weights_peers._passed(passing | {"round trip": False})


def test_one_bit_another_dtype_and_another_name_are_noticed() -> None:
    weights = {"a": np.float32([1, 2])}
    assert weights_peers._same_bits(dict(weights), weights, None)
    assert weights_peers._same_bits({"A": weights["a"]}, weights, str.upper)
    assert not weights_peers._same_bits({"a": np.float32([1, -2])}, weights, None)
    assert not weights_peers._same_bits({"a": np.float64([1, 2])}, weights, None)
    assert not weights_peers._same_bits({"b": weights["a"]}, weights, None)


def test_other_images_are_drawn_where_gradients_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([53.0, 1.0])
    monkeypatch.setattr(weights_peers.subprocess, "run", lambda *_, **__: None)
    key = "gradients: ours / torch"
    monkeypatch.setattr(weights_peers, "read", lambda *_: {key: next(ratios)})
    assert weights_peers.measured("python", "resnet18") == {key: 1.0, "draws": 2}


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        weights_peers.main(["python", "--models", "vgg"])
    assert "--models must be of resnet18" in capsys.readouterr().err
