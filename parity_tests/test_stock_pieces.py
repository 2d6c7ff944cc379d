"""``docs/stock_pieces.md`` says what the harness says of stock flax and optax."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import stock_pieces

WRITTEN = stock_pieces.PAGE.read_text(encoding="utf-8").splitlines()
ROWS = [line.split(" | ") for line in WRITTEN if line.startswith("| `")]


def test_the_page_has_a_row_for_every_piece() -> None:
    assert [row[0] for row in ROWS] == [f"| `{piece.name}`" for piece in stock_pieces.PIECES]


@pytest.mark.parametrize("piece", stock_pieces.PIECES, ids=lambda piece: piece.name)
def test_the_verdict_on_the_page_is_the_one_found_now(piece: stock_pieces.Piece) -> None:
    """Verdict and what differs in float64; the figures move with the machine in the last digits."""
    (written,) = (row for row in ROWS if row[0] == f"| `{piece.name}`")
    found = stock_pieces.row(piece, piece.compare()).split(" | ")
    assert written[:4] == found[:4]
