"""``docs/norms.md`` runs when pasted, and its table is what the script finds."""

import importlib
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests.support.layers import OFFSET_ERROR
from parity_tests.support.pages import pasted

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

norms_offset = importlib.import_module("norms_offset")
PAGE = (ROOT / "docs" / "norms.md").read_text(encoding="utf-8")
CELLS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| \w+ \| \d+ \|", line)
]


def test_the_page_on_norms_runs_when_pasted() -> None:
    names = pasted(PAGE)
    np.testing.assert_array_equal(names["again"], names["y"])
    assert not np.array_equal(names["z"], names["y"])
    # One image each on eight devices: the sums are those of y in another order.
    gap = jnp.abs(names["shares"][:, 0] - names["y"]).max()
    assert gap <= 2 * OFFSET_ERROR
    kept = np.asarray(names["x"], np.float64)[:4, 0][np.asarray(names["mask"])[..., 0]]
    moved = (np.asarray(names["tokens"].mean[...], np.float64)) / 0.1
    bound = 8 * np.finfo(np.float32).eps * np.abs(kept).max()
    assert np.abs(moved - kept.mean(0)).max() <= bound


def test_the_table_has_every_norm_and_mean() -> None:
    wanted = [(name, f"{mean:g}") for name in norms_offset.KINDS for mean in norms_offset.MEANS]
    assert [(cells[0], cells[1]) for cells in CELLS] == wanted


@pytest.mark.parametrize("name", norms_offset.KINDS)
def test_the_table_says_what_the_script_finds(name: str) -> None:
    """Figures move with the machine: ours keep the bound, the one-pass default breaks it."""
    for cells in CELLS:
        if cells[0] == name and cells[1] in ("0", "1000"):
            found = norms_offset.errors(norms_offset.KINDS[name], float(cells[1]))
            for errors in (found, [float(cell) for cell in cells[2:]]):
                assert errors[0] <= OFFSET_ERROR
                assert (errors[2] > 0.1) == (cells[1] == "1000")
