"""``benchmarks/attention.py`` compares what it says: same results, a row each, fitting figures."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import attention  # noqa: E402
import norms  # noqa: E402


def test_all_peers_compute_the_same_and_have_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(norms, "PAUSE", 0)
    options = ["--lengths", "256", "--dtypes", "float32", "--sizes", "1", "1", "8", "--rounds", "1"]
    table = attention.main(options)
    names = [(case.p, name) for case, name, _ in table]
    assert names == [
        (0.1, "flaxstab"), (0.1, "flax.nnx"), (0.1, "torch"),
        (0.0, "flaxstab"), (0.0, "flax.nnx"), (0.0, "jax.nn"), (0.0, "torch"),
    ]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == printed.index(attention.LINE.format(*attention.HEADS)) + 1 + len(table)
    for case, name, figures in table:
        assert figures["forward_backward_ms"] > 0
        # Query, key and value, and 8 bytes; the others keep logits of 256 x 256, torch alone not
        # without dropout, where it has a fused kernel.
        small = name == "flaxstab" or (name == "torch" and case.p == 0)
        assert figures["kept"] < 5 if small else figures["kept"] > 256 / 8

    case = attention.Case((1, 256, 1, 8), "float32", 0.0)
    results = []
    for peer in attention.peers(case, has_torch=True):
        y, gradients = peer.both()
        arrays = (peer.forward(), y, *gradients)
        results.append([laid_out(array, peer.name) for array in arrays])
    for found in results[1:]:
        for ours, theirs in zip(results[0], found, strict=True):
            # 256 terms, each rounded a few times.
            bound = 256 * np.finfo(np.float32).eps * np.abs(theirs).max()
            assert np.abs(ours - theirs).max() <= bound


def laid_out(array: jax.Array | torch.Tensor, name: str) -> np.ndarray:
    """Returns (N, S, H, E) in float64."""
    plain = array.detach() if isinstance(array, torch.Tensor) else array
    wide = np.asarray(plain, np.float64)
    return wide.swapaxes(1, 2) if name == "torch" else wide
