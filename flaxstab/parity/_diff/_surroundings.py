"""Compares what is recorded once: the environment, public names, random streams."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flaxstab.parity._diff._types import Effect, NameDiff, Setting, StreamDiff
from flaxstab.parity._inputs import Values, is_float, largest
from flaxstab.parity._record._baseline import Baseline, Signature

_OTHER = 1e-3  # of a draw's size: other draws differ by all of it, rounding by 1e-5 at most
_KEPT_APART = ("imports",)


def settings(old: Baseline, new: Baseline) -> tuple[Setting, ...]:
    """Returns in what two environments differ: packages first."""
    flat = [dict(_flat("", b.environment)) for b in (old, new)]
    names = [*flat[0], *(n for n in flat[1] if n not in flat[0])]
    found = [
        Setting(n.removeprefix("packages "), flat[0].get(n, ""), flat[1].get(n, ""))
        for n in sorted(names, key=lambda n: not n.startswith("packages "))
        if flat[0].get(n, "") != flat[1].get(n, "")
    ]
    if new.torch == "recorded":  # then PyTorch's absence is no change of its version
        found = [s for s in found if s.name != "torch" and not s.name.startswith("torch ")]
    return tuple(s for s in found if not s.name.startswith(_KEPT_APART))


def _flat(start: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{start} {name}".strip(), item)
    elif value is not None:
        yield start, str(value)


def names(old: Sequence[Signature], new: Sequence[Signature]) -> tuple[NameDiff, ...]:
    """Returns what became of public names; what may break a call comes first."""
    before, after = ({s.name: s.parameters for s in group} for group in (old, new))
    found = [NameDiff(n, "new", f"{n}({', '.join(after[n])})") for n in after if n not in before]
    found += _gone(before, after)
    for name in (n for n in before if n in after and before[n] != after[n]):
        found += _changed(name, before[name], after[name])
    return tuple(sorted(found, key=lambda d: (not d.matters, d.change == "gone", d.name)))


def _gone(
    before: Mapping[str, tuple[str, ...]], after: Mapping[str, tuple[str, ...]]
) -> Iterator[NameDiff]:
    """Yields names that are gone; of a module that has none any more, one line."""
    modules = {_module(name) for name in after}
    absent: dict[str, int] = {}
    for name in (n for n in before if n not in after):
        if _module(name) in modules:
            yield NameDiff(name, "gone", "it is no longer there")
        else:
            absent[_module(name)] = absent.get(_module(name), 0) + 1
    for module, count in absent.items():
        yield NameDiff(module, "gone", f"it cannot be imported: {count} names")


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _changed(name: str, old: tuple[str, ...], new: tuple[str, ...]) -> Iterator[NameDiff]:
    if ("?",) in (old, new):  # what a built-in function takes cannot be asked
        return
    before, after = (dict(_split(word) for word in group) for group in (old, new))
    for key in (k for k in before if k not in after and k != "*"):
        yield NameDiff(name, "parameter gone", f"{key} is no longer taken")
    for key in (k for k in after if k not in before and k != "*"):
        required = "" if after[key] or key.startswith("*") else ", which has no default"
        words = f"{key}{'=' * bool(after[key])}{after[key]} is new{required}"
        yield NameDiff(name, "default" if required else "parameter new", words)
    for key in (k for k in before if k in after and before[k] != after[k]):
        words = f"{key}={before[key] or '(none)'} became {after[key] or '(none)'}"
        yield NameDiff(name, "default", words)
    orders = [[k for k in _positional(group) if k in before and k in after] for group in (old, new)]
    if orders[0] != orders[1][: len(orders[0])]:
        words = f"positional parameters were {', '.join(orders[0])}, are {', '.join(orders[1])}"
        yield NameDiff(name, "order", words)


def _split(word: str) -> tuple[str, str]:
    name, _, default = word.partition("=")
    return name, default


def _positional(parameters: Sequence[str]) -> list[str]:
    found = []
    for word in parameters:
        if word.startswith("*"):
            break
        found.append(_split(word)[0])
    return found


def streams(old: Baseline, new: Baseline) -> tuple[StreamDiff, ...]:
    """Returns what became of random functions, other streams first; equal ones are left out."""
    failures = {mark.name: mark.word for mark in new.failures}
    found = [_stream(name, array, new.streams, failures) for name, array in old.streams.items()]
    found += [StreamDiff(n, Effect.NEW) for n in new.streams if n not in old.streams]
    order = [Effect.STREAM, Effect.GONE, Effect.ROUNDING, Effect.NEW]
    moved = [diff for diff in found if diff.effect is not Effect.SAME]
    return tuple(sorted(moved, key=lambda diff: order.index(diff.effect)))


def _stream(name: str, old: np.ndarray, drawn: Values, failures: Mapping[str, str]) -> StreamDiff:
    if name not in drawn:
        words = failures.get(name, "it was not asked")
        return StreamDiff(name, Effect.GONE, words)
    new = drawn[name]
    if old.dtype != new.dtype or old.shape != new.shape:
        words = f"draws {new.dtype} of shape {new.shape}, drew {old.dtype} of {old.shape}"
        return StreamDiff(name, Effect.STREAM, words)
    if old.tobytes() == new.tobytes():
        return StreamDiff(name, Effect.SAME)
    if not is_float(old):
        share = float(np.mean(old != new))
        return StreamDiff(name, Effect.STREAM, f"{share:.0%} of the draws are others")
    gap = largest(np.asarray(old, np.float64) - np.asarray(new, np.float64))
    part = gap / max(largest(old), np.finfo(np.float64).tiny)
    if not part <= _OTHER or not np.array_equal(np.isfinite(old), np.isfinite(new)):
        return StreamDiff(name, Effect.STREAM, f"draws differ by {part:.1g} of their size")
    return StreamDiff(name, Effect.ROUNDING, f"draws differ by {part:.0e} of their size")
