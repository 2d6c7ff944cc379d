"""``docs/porting.md`` runs when pasted, and every test and every name that it gives exists."""

import ast
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.pages import pasted

ROOT = Path(__file__).parents[1]
PAGE_FILE = ROOT / "docs" / "porting.md"
if not PAGE_FILE.is_file():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
PAGE = PAGE_FILE.read_text(encoding="utf-8")
HEADER = ["PyTorch", "the trap in JAX", "symptom", "here", "guarded by"]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ")
]


def _tests(file: str) -> set[str]:
    tree = ast.parse((ROOT / "parity_tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def missing(page: str) -> list[str]:
    """Returns the tests that a page names and that do not exist."""
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", page))
    known = {file: _tests(file) for file, _ in named if (ROOT / "parity_tests" / file).is_file()}
    return [f"{file}::{test}" for file, test in named if test not in known.get(file, ())]


def test_every_test_that_is_named_exists() -> None:
    assert not missing(PAGE)


def test_a_test_that_does_not_exist_is_noticed() -> None:
    assert missing("`test_norms.py::test_nothing`") == ["test_norms.py::test_nothing"]
    assert missing("`test_no.py::test_nothing`") == ["test_no.py::test_nothing"]


def test_every_trap_has_five_cells_and_a_guard() -> None:
    assert ROWS.count(HEADER) == PAGE.count("|---|---|---|---|---|")
    traps = [row for row in ROWS if row != HEADER]
    assert all(len(row) == 5 for row in traps)
    # What stock JAX does and no layer here decides: for the reader to know.
    unguarded = [row[0] for row in traps if "::" not in row[-1]]
    assert unguarded == ["`var`, `std` are unbiased", "float32 matrix products are float32"]


def test_every_name_that_is_given_exists() -> None:
    names = set(re.findall(r"`(?:flaxstab\.)?([a-z_]+)\.([A-Za-z_]+)", PAGE))
    modules = {"attention", "blocks", "dropout", "functional", "initializers", "interop", "linear",
               "norms", "optim", "parity", "surgery", "torch_rng"}  # fmt: skip
    given = [(module, name) for module, name in names if module in modules]
    assert len(given) > 40
    for module, name in given:
        assert hasattr(importlib.import_module(f"flaxstab.{module}"), name), (module, name)


def test_links_inside_the_page_have_their_heading() -> None:
    headings = {h.lower().replace(",", "").replace(" ", "-")
                for h in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)}  # fmt: skip
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) == headings


def test_the_page_runs_when_pasted() -> None:
    names = pasted(PAGE)
    assert names["report"].complete
    assert names["back"].keys() == names["state"].keys()
    assert (names["eps"], names["momentum"], names["stride"]) == (1e-3, 0.2, (2, 2))
    assert names["logits"].shape == (2, 10)
    assert int(names["optimizer"].step[...]) == 1
    assert names["verdict"].passed
    moved = np.asarray(names["twin"].layers[1].mean[...])
    np.testing.assert_array_equal(moved, names["module"][1].running_mean.numpy())
