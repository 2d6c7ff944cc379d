"""``benchmarks/norms.py`` compares what it says: same results, every row, figures that add up."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import norm_peers  # noqa: E402
import norms  # noqa: E402

from parity_tests.support.kept import kept_bytes  # noqa: E402

SIZES = {name: norms.QUICK[name in norm_peers.IMAGE_NORMS][0] for name in norms.FLOORS}
SHAPES = {name: tuple(map(int, size.split("x"))) for name, size in SIZES.items()}
EQX, _ = norms.optional("equinox")
JAX_PEERS = ["flaxstab", "nnx stable", "nnx default"] + ["equinox"] * (EQX is not None)


def names(norm: str) -> list[str]:
    images = ["torch NCHW", "torch channels_last"]
    return JAX_PEERS + (images if norm in norm_peers.IMAGE_NORMS else ["torch"])


def results(peer: norm_peers.Peer, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Returns output and gradients in float64, features last."""
    y, (dx, *affine) = peer.both()
    arrays = [np.asarray(a.detach() if isinstance(a, torch.Tensor) else a, np.float64)
              for a in (peer.forward(), y, dx, *affine)]  # fmt: skip
    return [a if a.ndim < 2 or a.shape == shape else np.moveaxis(a, 1, -1) for a in arrays]


def assert_equal_results(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert left.shape == right.shape
        # A cancelling sum of at most 64 terms, each rounded a few times.
        bound = 256 * np.finfo(np.float32).eps * np.max(np.abs(right))
        assert np.max(np.abs(left - right)) <= bound


class Run(NamedTuple):
    """What the script wrote, and the peers it timed, case by case."""

    written: dict[str, object]
    peers: list[list[norm_peers.Peer]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("norms") / "figures.json"
    timed, peers = norms.timed, []

    def spy(given: list[norm_peers.Peer], rounds: int, queued: int) -> dict[str, norms.Figures]:
        peers.append(given)
        return timed(given, rounds, queued)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "timed", spy)
        patch.setattr(norms, "PAUSE", 0)
        norms.main(["--quick", "--dtypes", "float32", "--json", str(path)])
    assert list(path.parent.iterdir()) == [path]
    return Run(json.loads(path.read_text(encoding="utf-8")), peers)


def test_all_peers_compute_the_same(run: Run) -> None:
    for norm, peers in zip(norms.FLOORS, run.peers, strict=True):
        found = [results(peer, SHAPES[norm]) for peer in peers]
        assert [peer.name for peer in peers] == names(norm)
        assert len(found[0]) == (4 if norm == "RMSNorm" else 5)
        for arrays in found:
            assert_equal_results(arrays, found[-1])
            with pytest.raises(AssertionError):
                assert_equal_results([*arrays[:-1], arrays[-1] * 1.001], found[-1])


def test_every_norm_and_peer_has_a_row(run: Run) -> None:
    keys = [(r["norm"], r["dtype"], tuple(r["shape"]), r["peer"]) for r in run.written["rows"]]
    assert keys == [(norm, "float32", SHAPES[norm], name) for norm in norms.FLOORS
                    for name in names(norm)]  # fmt: skip
    assert len(run.written["left_out"]) == (EQX is None)
    assert run.written["versions"]["jax"] == jax.__version__
    assert {"date", "device", "rounds", "copy_bytes_per_second"} <= set(run.written)
    defaults = norms.options([])
    assert (defaults.norms, defaults.dtypes) == (list(norms.FLOORS), ["float32", "bfloat16"])


def test_figures_are_positive_and_ratios_are_to_flaxstab(run: Run) -> None:
    base: dict[str, object] = {}
    for row in run.written["rows"]:
        base = row if row["peer"] == "flaxstab" else base
        for what in ("forward", "forward_backward"):
            assert row[f"{what}_ms"] > 0
            assert row[f"{what}_ratio"] == row[f"{what}_ms"] / base[f"{what}_ms"]
        assert row["kept"] > 0
        counted = {"temporaries", "bytes_accessed", "fusions", "loops"} & set(row)
        assert len(counted) == (4 if row["peer"] in JAX_PEERS else 0)
        if counted:
            # Input, cotangent, output and gradient at least.
            assert row["bytes_accessed"] >= 4
            assert row["fusions"] > 0
        assert "of_copy_bandwidth" not in row


def assert_kept_as_counted(row: dict[str, object]) -> None:
    x = jnp.linspace(-1.0, 2.0, int(np.prod(row["shape"])), dtype=row["dtype"])
    affine = tuple(jnp.ones(row["shape"][-1]) for _ in range(1 + (row["norm"] != "RMSNorm")))
    f = norm_peers.OURS[row["norm"]]
    kept = kept_bytes(f, x.reshape(row["shape"]), *affine, parameters=affine)
    assert row["input_bytes"] == x.nbytes
    assert row["kept"] == kept / x.nbytes


def test_kept_is_what_the_helper_counts(run: Run) -> None:
    ours = [row for row in run.written["rows"] if row["peer"] == "flaxstab"]
    for row in ours:
        assert_kept_as_counted(row)
        with pytest.raises(AssertionError):
            assert_kept_as_counted({**row, "kept": row["kept"] + 0.01})


@pytest.mark.parametrize(
    ("f", "expected"),
    [(torch.add, 0), (torch.mul, 1), (lambda x, scale: x * x * scale[:1], 2),
     (lambda x, scale: x.exp() * scale + x * x, 2)],
    ids=["nothing", "no parameter", "the input twice and its square", "two arrays"],
)  # fmt: skip
def test_what_pytorch_saves_is_counted_once(f: Callable[..., object], expected: int) -> None:
    x, scale = torch.rand(8, 64, requires_grad=True), torch.rand(64, requires_grad=True)
    assert norm_peers.torch_kept(torch, f, x, [scale]) == expected * 8 * 64 * 4


def test_bandwidth_is_the_floor_over_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = norms.make_case("BatchNorm", "bfloat16", SHAPES["BatchNorm"])
    found = {"flaxstab": {"forward_backward_ms": 2.0}}
    assert "of_copy_bandwidth" not in norms.rows(case, found, 1e6)[0]  # the cache may hold it
    monkeypatch.setattr(norms, "BEYOND_CACHE", 0)
    (row,) = norms.rows(case, found, 1e6)
    assert row["of_copy_bandwidth"] == pytest.approx(8 * case.x.size * 2 / 2e-3 / 1e6)
    assert "of_copy_bandwidth" not in norms.rows(case, found, None)[0]
    monkeypatch.setattr(norms, "COPIED", 1000)
    assert norms.copy_bandwidth(2) > 0


def test_a_peer_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(*_: object) -> norm_peers.Peer:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(norm_peers, "torch_peer", fails)
    path = tmp_path / "figures.json"
    norms.main(["--quick", "--norms", "RMSNorm", "--dtypes", "bfloat16", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["left_out"][-1] == "torch, RMSNorm bfloat16: no compiler"
    assert written["left_out"][-1] in capsys.readouterr().out
    assert [row["peer"] for row in written["rows"]] == JAX_PEERS
    assert_kept_as_counted(written["rows"][0])
    assert written["rows"][0]["dtype"] == "bfloat16"


def test_an_absent_package_is_left_out_with_the_reason() -> None:
    assert importlib.util.find_spec("no_such_package") is None
    assert norms.optional("no_such_package") == (
        None, "no_such_package: No module named 'no_such_package'"
    )  # fmt: skip


def test_a_loop_marks_the_bytes_as_a_lower_bound() -> None:
    row = {"norm": "LayerNorm", "bytes_accessed": 3.0, "loops": 0, "shape": [8, 64]}
    assert " 3.00" in norms.line(row)
    assert ">3.00" in norms.line({**row, "loops": 1})
    assert " 8x64 " in norms.line(row)
