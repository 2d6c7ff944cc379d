"""The page of the documentation that shows what the self-test found."""

from collections.abc import Sequence

from flaxstab.parity._selftest._instances import Instances
from flaxstab.parity._selftest._table import Table

_HEAD = """# What the harness finds: the kill matrix

This page is written by `{command}`. A fault is
planted in the JAX side or the PyTorch side, drawn at random; the sides are compared as every user
does; the side named must be the one it was planted in. *excess* is the error of the quantity that
must catch it, over its bound; *clean* is the largest such figure of the same case without a fault.
How sides are compared: [How two programs are compared](parity.md).
"""
_LAYERS = """
## Faults of one layer

In four small networks one layer, drawn at random, makes the mistake, on a random side. Named must
be that layer, the direction in which it differs first, and the side.
"""


def page(table: Table, instances: Instances, command: str) -> str:
    """Returns the page, as Markdown.

    Args:
      table: of the faults of layers, functions, optimizers and training steps.
      instances: of the faults of one layer of a network.
      command: that writes the page.
    """
    kinds = sorted({kind for o in table.outcomes for kind in o.kinds})
    heads = ("fault", "claim", "planted", "named", "caught by", "excess", "clean", *kinds)
    rows = [
        (
            o.fault.name, o.fault.claim, o.side, o.named or "-",
            f"`{o.caught}`" if o.caught else "- (a known limit)" if o.fault.limit else "MISSED",
            f"{o.excess:.2g}", f"{o.clean:.1g}",
            *("x" if kind in o.kinds else "" for kind in kinds),
        )
        for o in table.outcomes
    ]  # fmt: skip
    first, *others = instances.rows()
    return "\n".join(
        [
            _HEAD.format(command=command),
            _listed([*table.notes(), *table.sums(), *instances.sums()]),
            "\n## Fault by check\n",
            _table(heads, rows),
            _LAYERS,
            _table(first, others),
            "",
        ]
    )


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
