"""Named tuples as what JSON can hold, and back: exactly, or refused with the place."""

import json
import math
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from flaxstab._checks import check

LARGEST = 1 << 28  # bytes of a file that is read; 100,000 findings take 30 MB
_SPELLED = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # JSON has no such numbers

_ODD = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SINGLE: dict[object, tuple[str, tuple[type, ...]]] = {
    float: ("a number", (int, float)),
    int: ("an integer", (int,)),
    bool: ("true or false", (bool,)),
    str: ("a string", (str,)),
}


def to_plain(value: object) -> object:
    """Returns dicts, lists, strings, numbers and None for nested named tuples.

    Args:
      value: holds named tuples, tuples, mappings and plain values.
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        names = _hints(type(value))
        return {name: to_plain(item) for name, item in value._asdict().items() if name in names}
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return _plain(value)


def _plain(value: object) -> str | bool | int | float | None:
    if isinstance(value, str):
        return str(value)  # of an enumeration
    if isinstance(value, bool | int | None):
        return value
    number = float(cast(float, value))
    if math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"


def from_plain(kind: object, value: object, place: str) -> object:
    """Returns what :func:`to_plain` was given.

    Args:
      kind: its type, with the types of its parts.
      value: what JSON held.
      place: where that is, for errors.

    Raises:
      ValueError: if the value is not of the kind, with the place of the first such part.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value if value in parts else _refuse(place, f"one of {list(parts)}", value)
    if origin in (Union, UnionType):
        return _union(parts, value, place)
    if origin is tuple:
        items = value if isinstance(value, list) else _refuse(place, "a list", value)
        return tuple(from_plain(parts[0], item, f"{place}[{i}]") for i, item in enumerate(items))
    if hasattr(kind, "_fields"):
        return _named_tuple(cast(type, kind), value, place)
    return _single(kind, value, place)


def _union(parts: tuple[object, ...], value: object, place: str) -> object:
    """Returns a value that may be None, or of several lists of literals."""
    if value is None and NoneType in parts:
        return None
    others = [part for part in parts if part is not NoneType]
    if len(others) > 1:
        words = tuple(word for part in others for word in get_args(part))
        return from_plain(Literal[words], value, place)
    return from_plain(others[0], value, place)


def _named_tuple(kind: type, value: object, place: str) -> object:
    fields = value if isinstance(value, dict) else _refuse(place, "an object", value)
    hints = _hints(kind)
    unknown = sorted(fields.keys() - hints.keys())
    if unknown:
        _refuse(place, f"of {sorted(hints)} alone", unknown[:3])
    absent = sorted(hints.keys() - fields.keys() - kind._field_defaults.keys())  # type: ignore[attr-defined]
    if absent:
        _refuse(place, f"an object with {', '.join(absent)}", sorted(fields))
    return kind(**{n: from_plain(hints[n], item, f"{place}.{n}") for n, item in fields.items()})


@cache
def _hints(kind: type) -> dict[str, object]:
    """Returns the types of a named tuple's fields, but for those that hold functions."""
    hints = get_type_hints(kind)
    return {n: hint for n, hint in hints.items() if not _is_function(hint)}


def _is_function(hint: object) -> bool:
    return get_origin(hint) is Callable or any(get_origin(p) is Callable for p in get_args(hint))


def _single(kind: object, value: object, place: str) -> object:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        known = [str(member) for member in kind]
        return kind(value) if value in known else _refuse(place, f"one of {known}", value)
    if kind is float and isinstance(value, str) and value in _SPELLED:
        return _SPELLED[value]
    name, types = _SINGLE.get(kind, ("an object", (dict,)))
    if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
        _refuse(place, name, value)
    if kind is not float:
        return value
    try:
        return float(cast(float, value))
    except OverflowError:  # JSON's integers have any number of digits
        _refuse(place, "a number that a float64 can hold", value)


def _refuse(place: str, rule: str, value: object) -> NoReturn:
    raise ValueError(f"{place} must be {rule}, got {_short(value)}. Write the file again.")


def _short(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # an integer of thousands of digits
        return f"one with {type(value).__name__}s of thousands of digits"


def printable(words: str) -> str:
    """Returns text in which a replacement stands for what neither a terminal nor HTML may get."""
    return _ODD.sub("\N{REPLACEMENT CHARACTER}", words)


def read_plain(path: Path, kind: str, schema: int) -> dict[str, object]:
    """Returns a JSON file's object, if it is one of ours and not of a newer flaxstab.

    Args:
      path: the file.
      kind: what its ``format`` must be.
      schema: the newest that can be read.

    Raises:
      ValueError: if it is not there, too large, not whole, foreign or newer.
    """
    check(
        path.is_file(), "the file must be there", file=str(path), fix="Name one that was written."
    )
    size = path.stat().st_size
    check(size <= LARGEST, f"the file must have {LARGEST} bytes at most", file=str(path), size=size)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's own are ValueErrors
        raise ValueError(
            f"{path.name} must be a whole JSON file, got {_where(error)}. Write it again."
        ) from None
    return check_header(held, path.name, kind, schema)


def check_header(held: object, name: str, kind: str, schema: int) -> dict[str, object]:
    """Returns what JSON held, if it is an object of ours and not of a newer flaxstab.

    Args:
      held: what was read.
      name: of where it was read, for errors.
      kind: what its ``format`` must be.
      schema: the newest that can be read.

    Raises:
      ValueError: if it is foreign or newer.
    """
    if not isinstance(held, dict) or held.get("format") != kind:
        found = held.get("format") if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"{name} must be of format {kind!r}, got {_short(found)}.")
    version = held.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{name}: schema must be an integer of at least 1, got {_short(version)}.")
    if version > schema:
        raise ValueError(
            f"{name} must have schema {schema} or older, got schema {_short(version)}, which a "
            "newer flaxstab wrote. Read it there: pip install -U flaxstab."
        )
    return held


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.lower()} in line {error.lineno}, column {error.colno}"
    return "lists too deep" if isinstance(error, RecursionError) else f"{error}"
