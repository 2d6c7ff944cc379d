"""``examples/same_seed_same_weights.py`` compares every bit, and says so when one differs."""

import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.torch_bits import same_processor

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import same_seed_same_weights as example

Captured = pytest.CaptureFixture[str]


@same_processor
def test_both_frameworks_have_the_same_bits(capsys: Captured) -> None:
    assert example.main(["--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert "torch.manual_seed(7)" in printed
    assert printed.count(" 0 of ") == len(example.MODELS)
    assert "\n0 bits differ." in printed


def test_another_seed_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    twins = example.Twins(example.transformer, lambda seed: example.torch_transformer(seed + 1))
    monkeypatch.setattr(example, "MODELS", {"Transformer": twins})
    assert example.main([]) == 1
    assert " 0 of " not in capsys.readouterr().out


def test_one_bit_and_another_structure_are_noticed() -> None:
    one, other = {"w": np.float32([1, 2])}, {"w": np.nextafter(np.float32([1, 2]), np.float32(0))}
    assert example.differing(one, one) == 0
    assert example.differing({"w": one["w"]}, {"w": np.float32([1, -2])}) == 1
    assert example.differing(one, other) > 1
    with pytest.raises(ValueError, match="differ in structure"):
        example.differing(one, {"v": one["w"]})


def test_pytorch_is_not_needed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda _: None)
    assert example.main(["--seed", "-1"]) == 0
    assert "PyTorch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("seed", ["x", "1.5", str(2**64)])
def test_bad_seeds_end_in_one_line(seed: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main(["--seed", seed])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
