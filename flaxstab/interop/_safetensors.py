"""The safetensors format in NumPy: a header of JSON, then the numbers. Nothing in it is trusted."""

import json
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import ml_dtypes
import numpy as np

from flaxstab._checks import check
from flaxstab._typing import Shape

_LENGTH = 8  # bytes of the header's length, little-endian
_LARGEST = 100_000_000  # bytes of a header, as in the reference implementation
_ALIGNED = 8  # bytes; the header is padded to a multiple
_AXES = 32  # of a tensor
_FAR = 2**48  # bytes; no file has as many, and NumPy can still compute with it
_SHOWN = 80  # characters of something odd

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "UI" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor lies in the file, behind the header."""

    dtype: np.dtype
    shape: Shape
    begin: int
    end: int


class Header(NamedTuple):
    """What a file says that it holds, all of it checked.

    Attributes:
      places: of the tensors, by name.
      metadata: the writer's own words.
      start: where the numbers begin, in bytes.
      size: of the numbers, in bytes.
    """

    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    start: int
    size: int


def read_header(path: Path) -> Header:
    """Returns a file's header.

    Raises:
      ValueError: if the file is not exactly what its header says.
    """
    with path.open("rb") as file:
        return _header(file, path)


def read(path: Path, *, mapped: bool = False) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Returns a file's tensors and metadata; the tensors are views of one array.

    Args:
      path: the file.
      mapped: whether that array is the file itself, read only where and when it is used, instead of
        memory of its own.

    Raises:
      ValueError: if the file is not exactly what its header says.
    """
    with path.open("rb") as file:
        header = _header(file, path)
        if mapped and header.size:
            whole = np.memmap(file, np.uint8, "r", header.start, (header.size,))
            data = whole.view(np.ndarray)
        else:
            data = np.fromfile(file, np.uint8, header.size)
    _check(len(data) == header.size, path, "must hold all its tensors", bytes=len(data))
    found = {name: _view(path, name, place, data) for name, place in header.places.items()}
    return found, header.metadata


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors by name: the same ones always give the same bytes.

    Raises:
      ValueError: if the format does not know a dtype.
    """
    for name, array in tensors.items():
        check(
            array.dtype.newbyteorder("<") in _NAMES or array.dtype in _NAMES,
            "safetensors must know the dtype of every tensor",
            fix=f"It knows {', '.join(map(str, _NAMES))}.",
            tensor=name,
            dtype=str(array.dtype),
        )
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    # The widest first, so that every one is aligned; otherwise in their order.
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in order:
        array = tensors[name]
        dtype = _NAMES.get(array.dtype) or _NAMES[array.dtype.newbyteorder("<")]
        offsets = (end, end + array.nbytes)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        end = offsets[1]
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words += b" " * (-len(words) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(words).to_bytes(_LENGTH, "little") + words)
        for name in order:
            file.write(_bytes(tensors[name]))


def parsed(path: Path, text: bytes) -> Mapping[str, object]:
    """Returns an object of JSON, in which every key appears once and every number is finite.

    Raises:
      ValueError: if it is something else.
    """
    try:
        words = text.decode("utf-8")  # json.loads would guess among encodings
        found = json.loads(words, object_pairs_hook=_once, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        advice = advice_on(path)
        raise ValueError(f"{_rule(path)} must hold JSON, got {error}. {advice}") from error
    _check(isinstance(found, dict), path, "must hold an object of JSON", found=type(found).__name__)
    return found


def advice_on(path: Path) -> str:
    """Returns what a file's first bytes advise."""
    with path.open("rb") as file:
        first = file.read(4)
    if first[:1] == b"\x80" or first == b"PK\x03\x04":
        return "It is a PyTorch file by its content: name it .pt."
    if first.startswith(b"vers"):
        return "It is a pointer to a file in Git LFS: fetch that with git lfs pull."
    return "It is damaged, or of another format: fetch it again."


def _header(file: BinaryIO, path: Path) -> Header:
    size = path.stat().st_size
    _check(size >= _LENGTH, path, "must begin with the length of its header", bytes=size)
    length = int.from_bytes(file.read(_LENGTH), "little")
    _check(
        2 <= length <= min(_LARGEST, size - _LENGTH),
        path,
        f"must have a header no longer than the file and {_LARGEST} bytes",
        header=length,
        bytes=size,
    )
    found = dict(parsed(path, file.read(length)))
    metadata = found.pop("__metadata__", {})
    _check(
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()),
        path,
        "must have metadata of strings",
        metadata=type(metadata).__name__,
    )
    places = {name: _place(path, name, given) for name, given in found.items()}
    start = _LENGTH + length
    _check_offsets(path, places, size - start)
    return Header(places, cast(dict[str, str], metadata), start, size - start)


def _place(path: Path, name: str, given: object) -> Place:
    """Returns where a tensor lies, if its entry in the header can be true."""
    entry = given if isinstance(given, dict) else {}
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    _check(
        len(entry) == 3
        and isinstance(kind, str)
        and _are_sizes(shape, range(_AXES + 1))
        and _are_sizes(offsets, (2,)),
        path,
        "must give each tensor a dtype, a shape and two offsets",
        tensor=name,
        entry=str(given)[:_SHOWN],
    )
    dtype = DTYPES.get(str(kind))
    known = ", ".join(DTYPES)
    _check(dtype is not None, path, f"must hold a dtype in {known}", tensor=name, dtype=kind)
    sizes, (begin, end) = cast(list[int], shape), cast(list[int], offsets)
    place = Place(cast(np.dtype, dtype), tuple(sizes), begin, end)
    # An axis of 0 hides what the others come to, and NumPy multiplies them all the same.
    spread = math.prod(n for n in sizes if n) * place.dtype.itemsize
    _check(spread < _FAR, path, "must have sizes that a file can have", tensor=name, shape=sizes)
    needed = math.prod(sizes) * place.dtype.itemsize
    _check(
        end - begin == needed,
        path,
        f"must have offsets as far apart as the tensor has bytes, {needed}",
        tensor=name,
        data_offsets=offsets,
    )
    return place


def _are_sizes(value: object, lengths: Container[int]) -> bool:
    """Whether a value is a list of integers that are sizes, of one of some lengths."""
    listed = value if isinstance(value, list) else [None]
    return len(listed) in lengths and all(type(n) is int and 0 <= n < _FAR for n in listed)


def _check_offsets(path: Path, places: Mapping[str, Place], size: int) -> None:
    """Raises a ``ValueError`` unless the tensors fill the file, one behind the other."""
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        _check(
            place.begin == end,
            path,
            "must hold one tensor behind the other, without gaps and overlaps",
            tensor=name,
            begins=place.begin,
            the_one_before_ends=end,
        )
        end = place.end
    _check(end == size, path, "must be as long as its header says", needs=end, has=size)


def _view(path: Path, name: str, place: Place, data: np.ndarray) -> np.ndarray:
    part = data[place.begin : place.end]
    if place.dtype == np.bool_:
        _check(not np.any(part > 1), path, "must hold booleans of 0 and 1", tensor=name)
    if place.begin % place.dtype.itemsize:  # written without regard to that
        part = part.copy()
    return part.view(place.dtype).reshape(place.shape)


def _bytes(array: np.ndarray) -> memoryview:
    """Returns an array's numbers, in order, little-endian, without a copy where it can be."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _not_finite(word: str) -> object:
    raise ValueError(f"{word}, a number that is not finite")


def _rule(path: Path) -> str:
    return f"{path.name!r} in {str(path.parent)!r}"


def _check(condition: bool, path: Path, rule: str, **given: object) -> None:
    """Raises a ``ValueError`` that begins with the file's name and ends with what to do."""
    if not condition:
        check(condition, f"{_rule(path)} {rule}", fix=advice_on(path), **given)
