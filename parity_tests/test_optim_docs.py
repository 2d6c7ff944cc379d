"""``docs/optim.md`` runs when pasted and says what is so; the benchmarks compare equal things."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

benchmark = importlib.import_module("optim")
differences = importlib.import_module("optim_differences")
PAGE = (ROOT / "docs" / "optim.md").read_text(encoding="utf-8")


def test_the_page_runs_when_pasted_and_prints_the_table_shown() -> None:
    codes = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(codes) == len(re.findall("```python", PAGE)) == 7
    names: dict[str, object] = {}
    for code in codes:
        exec(code, names)  # noqa: S102
    (shown,) = re.findall(r"<!-- table -->\n```\n(.*?)\n```", PAGE, re.DOTALL)
    assert str(names["mask"]) == shown
    assert float(names["norm"]) > 0
    assert names["state"].skipped.shape == (len(shown.splitlines()) - 1,)
    assert names["groups"].groups[("embed", "embedding")] == "tables"


def test_the_table_of_optaxs_other_optimizers_is_what_the_script_finds() -> None:
    (table,) = re.findall(r"<!-- differences -->\n(.*?)\n\n", PAGE, re.DOTALL)
    shown = {row.split("|")[1].strip(): row.split(" | ") for row in table.splitlines()[2:]}
    found = differences.rows()
    assert shown.keys() == found.keys()
    for name, (plain, closest) in found.items():
        _, said_plain, arguments, said_closest, _ = shown[name]
        assert float(said_plain) == pytest.approx(plain, rel=0.05)
        assert arguments == differences.PEERS[name].arguments
        if differences.PEERS[name].why == "nothing":
            assert max(closest, float(said_closest)) <= 1e-12
        else:
            assert float(said_closest) == pytest.approx(closest, rel=0.05)
            assert closest > 1e-12


def test_all_peers_of_the_benchmark_take_the_same_step() -> None:
    for name, makers in benchmark.CASES.items():
        peers = [make() for make in makers(3, 20)]
        ends = []
        for peer in peers:
            for _ in range(3):
                peer.step()
            ends.append(np.concatenate([np.ravel(a) for a in peer.params()]))
        start = np.concatenate(benchmark.arrays(3, 20, 0))
        for peer, end in zip(peers, ends, strict=True):
            # A few roundings of the parameter in each of three steps.
            bound = 16 * np.finfo(np.float32).eps * np.max(np.abs(start))
            assert np.max(np.abs(end - ends[0])) <= bound, (name, peer.name)
            assert np.max(np.abs(end - start)) > 100 * bound


def test_the_benchmark_has_a_row_for_every_peer(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    benchmark.main(["--quick", "--cases", "adamw", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [row["peer"] for row in written["rows"]] == [
        "flaxstab", "optax", "torch foreach", "torch fused",
    ]  # fmt: skip
    for row in written["rows"]:
        assert row["ratio"] == row["ms"] / written["rows"][0]["ms"] > 0
        assert ("bytes_per_parameter" in row) == (not row["peer"].startswith("torch"))
    assert written["versions"].keys() == {"jax", "optax", "torch"}
