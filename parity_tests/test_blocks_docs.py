"""``docs/blocks.md`` runs when pasted, and its figures are those of the tests."""

import math
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from flaxstab import blocks, models, recipes
from parity_tests.support.pages import pasted
from parity_tests.test_blocks_memory import BLOCKS

PAGE = Path(__file__).parents[1] / "docs" / "blocks.md"
if not PAGE.is_file():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")


def cells(pattern: str) -> list[list[str]]:
    rows = (line.strip("|").split("|") for line in TEXT.splitlines() if re.match(pattern, line))
    return [[cell.strip() for cell in row] for row in rows]


def test_the_page_on_blocks_runs_when_pasted() -> None:
    pasted(TEXT)


def test_the_table_names_every_block_and_what_it_keeps() -> None:
    rows = cells(r"\| `\w+\(in_ch")
    named = {re.match(r"`(\w+)\(", row[0])[1]: float(row[3]) for row in rows}
    exported = {n for n, c in vars(blocks).items() if isinstance(c, type)
                and issubclass(c, nnx.Module) and "Transformer" not in n}  # fmt: skip
    assert named.keys() <= exported
    tested = {make.func.__name__: kept for name, (make, kept) in BLOCKS.items()
              if "projection" not in name}  # fmt: skip
    assert named == tested


@pytest.mark.parametrize("preact", [False, True])
def test_the_table_of_resnets_counts_right(preact: bool) -> None:
    for name, *counts in cells(r"\| `resnet"):
        if name in ("`resnet18`", "`resnet50`"):  # test_models_resnet.py counts them all
            make = getattr(models, "preact_" * preact + name.strip("`"))
            model = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
            found = sum(math.prod(a.shape) for a in jax.tree.leaves(nnx.state(model, nnx.Param)))
            assert found == int(counts[preact].replace(",", ""))


def test_the_table_of_recipes_says_what_they_hold() -> None:
    (dropout,), (decay,) = cells(r"\| dropout \|"), cells(r"\| AdamW's decay \|")
    for place, name in enumerate(("cnn", "small_batch", "transformer"), start=1):
        recipe = getattr(recipes, name)
        low, high = (recipe.source("weight_decay")._asdict()[end] for end in ("low", "high"))
        assert decay[place] == f"{recipe.weight_decay} ({low} to {high})"
        assert dropout[place].startswith(f"{recipe.dropout:g} (to {recipe.source('dropout').high})")
