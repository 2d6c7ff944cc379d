"""Which tensor may have been meant by a name that found no counterpart."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from flaxstab._typing import Shape

_KEPT = 3


def nearest(
    wanted: Mapping[str, Shape | None], others: Mapping[str, Shape | None]
) -> dict[str, tuple[str, ...]]:
    """Returns for each name the most similar ones of others, by shape and then by name.

    Args:
      wanted: names with their tensors' shapes.
      others: those to choose from.
    """
    by_shape, by_ending = _grouped(others)
    return {
        name: _best(name, shape, {*by_shape[shape], *by_ending[_ending(name)]}, others)
        for name, shape in wanted.items()
    }


def _grouped(
    others: Mapping[str, Shape | None],
) -> tuple[Mapping[Shape | None, list[str]], Mapping[str, list[str]]]:
    by_shape: dict[Shape | None, list[str]] = defaultdict(list)
    by_ending: dict[str, list[str]] = defaultdict(list)
    for name, shape in others.items():
        by_shape[shape].append(name)
        by_ending[_ending(name)].append(name)
    return by_shape, by_ending


def _ending(name: str) -> str:
    """Returns the last two parts of a name: few names share these by chance."""
    return ".".join(name.split(".")[-2:])


def _best(
    name: str, shape: Shape | None, found: Iterable[str], others: Mapping[str, Shape | None]
) -> tuple[str, ...]:
    parts = name.split(".")

    def rank(other: str) -> tuple[bool, float, str]:
        return others[other] != shape, -_likeness(parts, other.split(".")), other

    return tuple(sorted(found, key=rank)[:_KEPT])


def _likeness(one: list[str], other: list[str]) -> float:
    """Returns how alike two names are: their common end, their common start, their common parts."""
    end = _common(reversed(one), reversed(other))
    start = _common(iter(one), iter(other))
    return 2 * end + start + len({*one} & {*other}) / (1 + max(len(one), len(other)))


def _common(one: Iterable[str], other: Iterable[str]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
