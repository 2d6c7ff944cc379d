"""Tensors in several safetensors files and an index of JSON that says which one is where."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from flaxstab._checks import check, check_positive
from flaxstab._files import write_all
from flaxstab.interop import _safetensors

INDEX = ".index.json"  # behind the name of the file that it stands for
_LARGEST = 100_000_000  # bytes of an index
_SHOWN = 80  # characters of something odd


def read(index: Path, *, mapped: bool = False) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Returns the tensors of all the files that an index names, and the first one's metadata.

    Every header is checked before the first number is read.

    Args:
      index: the index.
      mapped: as of :func:`flaxstab.interop._safetensors.read`.

    Raises:
      ValueError: if the index or a file is not sound, a file is missing, or what they hold is not
        exactly what the index says.
    """
    shards = [index.with_name(name) for name in _shards(index)]
    metadata = [_safetensors.read_header(shard).metadata for shard in shards]
    found: dict[str, np.ndarray] = {}
    for shard in shards:
        found |= _safetensors.read(shard, mapped=mapped)[0]
    return found, metadata[0]


def write(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], size: int
) -> Path:
    """Writes tensors in files of at most ``size`` bytes each, if one holds no more than that.

    Args:
      path: the name of the single file; those of several are made of it.
      tensors: by name.
      metadata: of every file.
      size: of the numbers, in bytes; a larger tensor gets a file of its own.

    Returns:
      The path of the file, or of the index. Nothing is in its place before everything is written,
      and the index comes last. Then what an older file or index of the same name left is removed.
    """
    check_positive(max_shard_size=size)
    parts = _parts(tensors, size)
    writes: dict[str | os.PathLike[str], Callable[[Path], object]] = {}
    where: dict[str, str] = {}
    for i, names in enumerate(parts, 1):
        name = path.name if len(parts) == 1 else _name(path, i, len(parts))
        held = {n: tensors[n] for n in names}
        writes[path.with_name(name)] = partial(
            _safetensors.write, tensors=held, metadata=dict(metadata)
        )
        where |= dict.fromkeys(names, name)
    index = path.with_name(path.name + INDEX)
    old = {path, index, *_left(path, index)} if index.exists() else {path}
    if len(parts) == 1:
        write_all(writes)
        _remove(old - {path})
        return path
    total = sum(array.nbytes for array in tensors.values())
    words = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)

    def write_index(unfinished: Path) -> None:
        unfinished.write_text(words, encoding="utf-8")
        index.unlink(missing_ok=True)  # an older one would name files new and old

    writes[index] = write_index
    write_all(writes)
    _remove(old - {Path(written) for written in writes})
    return index


def _left(path: Path, index: Path) -> list[Path]:
    """Returns the files that an older index of the same name has, if it can be read."""
    try:
        where = _safetensors.parsed(index, index.read_bytes()).get("weight_map")
    except (ValueError, OSError):
        return []
    named = {str(name) for name in where.values()} if isinstance(where, dict) else set()
    ours = re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
    return [path.with_name(name) for name in sorted(named) if ours.fullmatch(name)]


def _remove(files: Set[Path]) -> None:
    """Removes files, an index before those that it names."""
    for file in sorted(files, key=lambda file: not file.name.endswith(INDEX)):
        file.unlink(missing_ok=True)


def _name(path: Path, i: int, count: int) -> str:
    return f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}"


def _parts(tensors: Mapping[str, np.ndarray], size: int) -> Sequence[list[str]]:
    """Returns the names of each file's tensors, in their order."""
    parts: list[list[str]] = [[]]
    left = size
    for name, array in tensors.items():
        if parts[-1] and array.nbytes > left:
            parts.append([])
            left = size
        parts[-1].append(name)
        left -= array.nbytes
    return parts


def _shards(index: Path) -> list[str]:
    """Returns the names of the files; what they hold is what the index says."""
    size = index.stat().st_size
    _check(size <= _LARGEST, index, f"must have at most {_LARGEST} bytes", bytes=size)
    where = _safetensors.parsed(index, index.read_bytes()).get("weight_map")
    sound = isinstance(where, dict) and all(isinstance(name, str) for name in where.values())
    _check(
        sound and bool(where),
        index,
        "must have a weight_map from tensors to files",
        weight_map=str(where)[:_SHOWN],
    )
    of: dict[str, str] = dict(where) if isinstance(where, dict) else {}
    shards = sorted(set(of.values()))
    for shard in shards:
        _check(_is_name(shard), index, "must name files of its own folder", file=shard)
        there = index.with_name(shard).is_file()
        _check(there, index, "must name files that are there", missing=shard)
    held: dict[str, str] = {}
    for shard in shards:
        for name in _safetensors.read_header(index.with_name(shard)).places:
            once = name not in held
            _check(once, index, "must have every tensor in one file", tensor=name,
                   files=(held.get(name), shard))  # fmt: skip
            held[name] = shard
    for name in sorted(of.keys() | held.keys()):
        _check(
            of.get(name) == held.get(name),
            index,
            "must name the file that holds a tensor",
            tensor=name,
            named=of.get(name),
            holds_it=held.get(name),
        )
    return shards


def _is_name(name: str) -> bool:
    """Whether a path, as any system reads it, is the name of a file in the folder itself."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return name not in ("", ".", "..") and all(p.name == name and not p.drive for p in kinds)


def _check(condition: bool, index: Path, rule: str, **given: object) -> None:
    fix = "Fetch the whole folder again."
    check(condition, f"the index {str(index)!r} {rule}", fix=fix, **given)
