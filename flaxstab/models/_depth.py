"""How often a block's branch is dropped, by its place in the depth of a model."""

from dataclasses import replace
from typing import Literal

from flaxstab._checks import check
from flaxstab.blocks import Residual

DropPathRule = Literal["uniform", "linear"]


def check_drop_path_rule(rule: str, residual: Residual, *, scan: bool) -> None:
    """Raises a ``ValueError`` for an unknown rule, or one by which no two blocks are equal."""
    known = rule in ("uniform", "linear")
    check(known, "drop_path_rule must be 'uniform' or 'linear'", drop_path_rule=rule)
    grows = rule == "linear" and residual.drop_path > 0
    wanted = "scan=True needs equal blocks: pass drop_path_rule='uniform'"
    check(not (scan and grows), wanted, drop_path_rule=rule)


def residual_at(residual: Residual, rule: DropPathRule, place: int, total: int) -> Residual:
    """Returns the wiring of one block.

    Args:
      residual: that of the last one.
      rule: whether every block drops as often (``'uniform'``), or it grows from 0 in the first
        block to that in the last (``'linear'``).
      place: the block's place, from 0.
      total: the number of blocks.
    """
    share = place / max(total - 1, 1) if rule == "linear" else 1.0
    return replace(residual, drop_path=share * residual.drop_path)
