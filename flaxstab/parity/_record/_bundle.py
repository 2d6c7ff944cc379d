"""Named arrays in one zip file: ``.npy`` members without pickles, sizes checked before reading."""

import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple

import ml_dtypes
import numpy as np

LARGEST = 1 << 30  # bytes that a file's members may take together in memory
LARGEST_MANIFEST = 1 << 27
_BORROWED = {"bfloat16": "uint16"}  # kept as the bits: .npy does not know it
_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "bfloat16",
)  # fmt: skip
_AXES = 32
_LOCKED = 0x61  # flags: encrypted, strongly encrypted, patched
_HEADER = 1 << 14  # bytes, at most, that a member's header takes


class Entry(NamedTuple):
    """One array of a bundle.

    Attributes:
      name: what it is.
      dtype: its dtype's name.
      shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Bundle(NamedTuple):
    """Arrays that are kept together, one member of the file for each dtype.

    Attributes:
      name: of the members, before their dtype.
      entries: the arrays, in the order in which they lie in their members.
    """

    name: str
    entries: tuple[Entry, ...]


def write_bundle(file: zipfile.ZipFile, name: str, arrays: Mapping[str, np.ndarray]) -> Bundle:
    """Writes arrays to an open file; returns what :func:`read_bundle` needs to read them.

    Args:
      file: open for writing.
      name: of the bundle, unique in the file.
      arrays: by name.
    """
    entries, parts = [], dict[str, list[np.ndarray]]()
    for key, given in arrays.items():
        array = np.asarray(given)
        kind = array.dtype.name
        if kind not in _DTYPES:
            rule = f"a baseline's arrays must be of {', '.join(_DTYPES)}"
            raise ValueError(f"{rule}, got {key!r} of {kind}. Convert it first.")
        parts.setdefault(kind, []).append(np.ravel(array))
        entries.append(Entry(key, kind, array.shape))
    for kind, flat in parts.items():
        joined = np.concatenate(flat).view(_BORROWED.get(kind, kind))
        with io.BytesIO() as stream:
            little = joined.astype(joined.dtype.newbyteorder("<"), copy=False)
            np.lib.format.write_array(stream, little, version=(1, 0), allow_pickle=False)
            write_member(file, f"{name}/{kind}.npy", stream.getvalue())
    return Bundle(name, tuple(entries))


def write_member(file: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Writes one compressed member; equal contents give equal files."""
    info = zipfile.ZipInfo(name)  # of 1980, not of now
    info.compress_type = zipfile.ZIP_DEFLATED
    file.writestr(info, content, compresslevel=9)


def read_bundle(file: zipfile.ZipFile, bundle: Bundle) -> dict[str, np.ndarray]:
    """Reads arrays from an open file.

    Args:
      file: open for reading; :func:`check_members` was called, and :func:`check_bundles` for all.
      bundle: what :func:`write_bundle` returned.

    Raises:
      ValueError: if a member is absent, damaged, or not what the bundle says.
    """
    parts, found = dict[str, list[Entry]](), dict[str, np.ndarray]()
    for entry in bundle.entries:
        parts.setdefault(entry.dtype, []).append(entry)
    for kind, entries in parts.items():
        flat, start = _member(file, f"{bundle.name}/{kind}.npy", kind, entries), 0
        for entry in entries:
            size = math.prod(entry.shape)
            found[entry.name] = flat[start : start + size].reshape(entry.shape)
            start += size
    return {entry.name: found[entry.name] for entry in bundle.entries}


def _member(file: zipfile.ZipFile, name: str, kind: str, entries: list[Entry]) -> np.ndarray:
    count, stored = sum(math.prod(e.shape) for e in entries), _stored(kind)
    info = member_info(file, name)
    room = info.file_size - count * stored.itemsize
    if not 0 < room <= _HEADER:
        rule = f"{name} must hold {count} elements of {kind}"
        raise ValueError(f"{rule}, got {info.file_size} bytes")
    with file.open(info) as stream:
        array = _array(stream, name, stored, count)
    return array.view(ml_dtypes.bfloat16) if kind == "bfloat16" else array


def _stored(kind: str) -> np.dtype:
    """Returns the dtype that a member has in which a dtype is kept."""
    return np.dtype(_BORROWED.get(kind, kind))


def _array(stream: IO[bytes], name: str, dtype: np.dtype, count: int) -> np.ndarray:
    """Reads a member whose header says the dtype and shape that are expected, and no pickle."""
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, _, found = np.lib.format.read_array_header_1_0(stream)
        if found.newbyteorder("=") != dtype or shape != (count,):
            raise ValueError(f"{found} of shape {shape}")
        content = stream.read(count * dtype.itemsize + 1)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        rule = f"{name} must be an array of {dtype} and shape ({count},), without pickles"
        raise ValueError(f"{rule}, got {error}") from None
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"{name} must hold {count} elements, got {len(content)} bytes")
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype, copy=False)


def member_info(file: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Returns a member's entry in the directory.

    Raises:
      ValueError: if there is none.
    """
    try:
        return file.getinfo(name)
    except KeyError:
        raise ValueError(f"{name} must be in the file, got none") from None


def read_member(file: zipfile.ZipFile, name: str, largest: int) -> bytes:
    """Reads a member of a size that is allowed.

    Raises:
      ValueError: if it is absent, damaged or larger.
    """
    info = member_info(file, name)
    if info.file_size > largest:
        raise ValueError(f"{name} must have {largest} bytes at most, got {info.file_size}")
    try:
        with file.open(info) as stream:
            return stream.read(largest + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{name} must be whole, got {error}") from None


def check_members(file: zipfile.ZipFile) -> None:
    """Refuses a file whose members would not fit in memory, or are not as we write them.

    The directory's word is safe to take: no more than it says is ever read of a member.

    Raises:
      ValueError: if so.
    """
    size = 0
    for info in file.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"its members must be stored or deflated, got method {info.compress_type}"
                f" of {info.filename!r:.60}"
            )
        if info.flag_bits & _LOCKED:
            raise ValueError(f"its members must not be encrypted, got {info.filename!r:.60}")
        size += info.file_size
    if size > LARGEST:
        raise ValueError(f"its members must take {LARGEST} bytes at most, got {size}")


def check_bundles(bundles: Iterable[Bundle]) -> None:
    """Refuses bundles that ask for more than may be read, or for the same members.

    Raises:
      ValueError: if so; if a dtype or a size is none.
    """
    size, seen = 0, set[str]()
    for bundle in bundles:
        if bundle.name in seen:
            raise ValueError(f"bundles must have names of their own, got {bundle.name!r:.60} twice")
        seen.add(bundle.name)
        size += sum(_bytes(bundle.name, entry) for entry in bundle.entries)
    if size > LARGEST:
        raise ValueError(f"bundles must ask for {LARGEST} bytes at most, got more")


def _bytes(name: str, entry: Entry) -> int:
    if entry.dtype not in _DTYPES:
        raise ValueError(f"{name} must be of {', '.join(_DTYPES)}, got {entry.dtype!r:.40}")
    if len(entry.shape) > _AXES:
        raise ValueError(f"{name} must hold arrays of {_AXES} axes at most, got {len(entry.shape)}")
    if not all(0 <= size <= LARGEST for size in entry.shape):
        rule = f"{name} must hold arrays of sizes from 0 to {LARGEST}"
        raise ValueError(f"{rule}, got a negative or larger one")
    return math.prod(entry.shape) * _stored(entry.dtype).itemsize
