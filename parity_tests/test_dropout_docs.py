"""``docs/dropout.md`` runs when pasted, and what can be counted in its table is what is found."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxstab import dropout
from parity_tests.support.absent import needs_torch
from parity_tests.support.pages import pasted

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

benchmark = importlib.import_module("dropout")
PAGE = (ROOT / "docs" / "dropout.md").read_text(encoding="utf-8")
CELLS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith(("| float32 |", "| bfloat16 |"))
]


def test_the_page_on_dropout_runs_when_pasted() -> None:
    found = pasted(PAGE)
    same = [("same", "x"), ("again", "replayed"), ("stuck", None), ("whole", "steps")]
    for name, other in same:
        ours, theirs = found["stuck"] if other is None else (found[name], found[other])
        theirs = theirs.swapaxes(0, 1) if other == "steps" else theirs
        np.testing.assert_array_equal(ours, theirs)
    for name, other in (("first", "second"), ("one", "two"), ("outputs", "other")):
        assert bool((found[name] != found[other]).any())
    assert found["gradient"].shape == found["x"].shape
    assert found["outputs"].shape == found["more"].shape == (8, 16, 32)
    # 32,768 numbers, the square of one of them at most 4 (1 + 4)²: six standard errors are 0.1.
    assert abs(float(found["shift"]) - 3) < 0.1


def test_the_first_table_has_every_layer() -> None:
    named = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    assert set(named) == {name for name, c in vars(dropout).items() if isinstance(c, type)}


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, float]]:
    return benchmark.main(["--shapes", "64x96", "--dtypes", "bfloat16", "--rounds", "1"])


@needs_torch
def test_the_table_says_what_the_script_counts(figures: dict[str, dict[str, float]]) -> None:
    """Bytes and hashes per element do not depend on the size; times do, and on the machine."""
    names = ["flaxstab", "nnx", "flaxstab, philox4x32", "nnx, philox4x32", "torch"]
    assert list(figures) == names
    wanted = [(d, shape, name) for shape in benchmark.SHAPES for d in ("float32", "bfloat16")
              for name in names]  # fmt: skip
    assert [tuple(cells[:3]) for cells in CELLS] == wanted
    for _, _, name, kept, _, hashed, *ratios in (c for c in CELLS if c[0] == "bfloat16"):
        if name != "torch":
            assert float(kept) == pytest.approx(figures[name]["kept"], abs=0.01)
            assert float(hashed) == figures[name]["hashes"]
        assert len(ratios) == 2
    assert figures["flaxstab"]["kept"] * 64 * 96 * 2 <= 16


def test_dropout_is_faster_than_flaxs_in_the_table() -> None:
    """With JAX's default keys."""
    ratios = [float(cell) for cells in CELLS if cells[2] == "nnx" for cell in cells[6:]]
    assert len(ratios) == 2 * 2 * len(benchmark.SHAPES)
    assert min(ratios) > 1
