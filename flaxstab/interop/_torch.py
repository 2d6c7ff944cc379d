"""PyTorch's tensors and files: all of flaxstab.interop that may import PyTorch."""

import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax
import ml_dtypes
import numpy as np

from flaxstab._checks import check
from flaxstab._typing import PyTree

if TYPE_CHECKING:
    import torch

_SIZED = {
    "bfloat16": (np.int16, ml_dtypes.bfloat16),
    "float8_e4m3fn": (np.uint8, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": (np.uint8, ml_dtypes.float8_e5m2),
}  # dtypes that NumPy does not know: the integers of their size, and ml_dtypes' name
_WIDEST = 16  # bytes of a number


def to_numpy(value: object) -> np.ndarray:
    """Returns an array or a tensor (also one on a device, with a gradient, or bfloat16) as NumPy.

    bfloat16, which NumPy does not know, becomes float32: every value is exact.

    Args:
      value: a ``torch.Tensor`` or anything that ``np.asarray`` takes.
    """
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensors(tree: PyTree) -> PyTree:
    """Returns a tree of dicts, lists and tuples with PyTorch's tensors in the place of arrays.

    For what ``module.load_state_dict`` and ``optimizer.load_state_dict`` take. PyTorch must be
    installed.

    Args:
      tree: such as :func:`state_dict` or :func:`optimizer_state_dict` returns. Arrays of NumPy, of
        either byte order, and JAX, and NumPy's scalars, become tensors; anything else stays.

    Returns:
      Tensors of their own memory on the CPU, the same values exactly, bfloat16 and float8 too.

    Raises:
      ValueError: if PyTorch is not installed or has no such dtype.
    """
    torch = _imported()
    if isinstance(tree, Mapping):
        return {key: to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        inner = [to_tensors(value) for value in tree]
        named = hasattr(tree, "_fields")
        return type(tree)(*inner) if named else type(tree)(inner)
    if not isinstance(tree, np.ndarray | np.generic | jax.Array):
        return tree
    array = np.array(tree, order="C")  # of its own, with room for what torch changes in place
    if array.dtype.name in _SIZED:
        sized, _ = _SIZED[array.dtype.name]
        return torch.from_numpy(array.view(sized)).view(getattr(torch, array.dtype.name))
    check(
        array.dtype.kind in "biufc" and array.dtype.itemsize <= _WIDEST,
        "arrays must have a dtype that PyTorch has",
        dtype=str(array.dtype),
    )
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def read_pickled(path: Path, key: str | None) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that ``torch.save`` wrote; none of its code runs.

    Args:
      path: the file.
      key: which entry of the file holds them; ``None`` = the file itself, or its only entry that
        holds tensors and nothing else.

    Raises:
      ValueError: if PyTorch is not installed, the file holds more than tensors and plain values,
        or it is not plain where its tensors are.
    """
    _check_zip(path)
    found = _chosen(path, _loaded(path), key)
    return {name: _array(path, name, tensor) for name, tensor in found.items()}


def _imported() -> PyTree:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            "PyTorch's files and tensors need PyTorch, which cannot be imported. "
            "Install it: pip install 'flaxstab[torch]'."
        ) from error
    return torch


def _check_zip(path: Path) -> None:
    """Raises a ``ValueError`` if a zip archive would unpack to more than it is.

    ``torch.save`` does not compress.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
    except Exception as error:  # of any type: the file's bytes decide where zipfile stumbles
        raise ValueError(_damaged(path, error)) from error
    size = path.stat().st_size
    check(
        sum(sizes) <= size,
        f"{str(path)!r} must not be compressed",
        fix="Save it with torch.save.",
        unpacked=sum(sizes),
        bytes=size,
    )


def _loaded(path: Path) -> object:
    torch = _imported()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which it reads all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: the file's bytes decide where torch stumbles
        raise ValueError(_unread(path, error)) from error


def _unread(path: Path, error: Exception) -> str:
    """Returns why PyTorch did not read a file: it holds code, or it is damaged."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    legacy = "legacy .tar format" in str(error)
    # Of bytes that are no pickle PyTorch says which of them it does not know.
    torn = not isinstance(error, pickle.UnpicklingError) or re.search(r"operand \d", str(error))
    if torn and not (code or legacy):
        return _damaged(path, error)
    got = "the old format in a tar" if legacy else type(error).__name__
    got = f"code, {code.group(1)}" if code else got
    return (
        f"{str(path)!r} must hold tensors alone, got {got}; nothing in it was run. "
        "Save module.state_dict() with torch.save."
    )


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{str(path)!r} must be a whole file of torch.save, got one that is damaged or another "
        f"({type(error).__name__}). Fetch the file again."
    )


def _chosen(path: Path, whole: object, key: str | None) -> "Mapping[str, torch.Tensor]":
    """Returns the mapping from names to tensors that is meant."""
    entries: dict[object, object] = dict(whole) if isinstance(whole, Mapping) else {}
    if key is not None:
        held = ", ".join(map(repr, entries))
        check(key in entries, f"{str(path)!r} must have the entry", fix=f"It has {held}.", key=key)
        chosen = entries[key]
        check(
            _is_state_dict(chosen),
            f"{str(path)!r} must hold tensors by name, and nothing else, in the entry",
            key=key,
        )
        return cast("Mapping[str, torch.Tensor]", chosen)
    if _is_state_dict(whole):
        return cast("Mapping[str, torch.Tensor]", whole)
    inner = {name: value for name, value in entries.items() if _is_state_dict(value)}
    check(
        len(inner) == 1,
        f"{str(path)!r} must hold tensors by name, in one entry at most",
        fix="Say which one with key=." if inner else "Save module.state_dict() with torch.save.",
        found=sorted(map(str, inner)) or type(whole).__name__,
    )
    return cast("Mapping[str, torch.Tensor]", next(iter(inner.values())))


def _is_state_dict(value: object) -> bool:
    tensor = _imported().Tensor
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, tensor) for k, v in value.items())
    )


def _array(path: Path, name: str, tensor: "torch.Tensor") -> np.ndarray:
    """Returns a tensor in its own dtype."""
    torch = _imported()
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    plain = plain and not tensor.is_quantized
    # Strides of 0 make a small file a tensor of any size.
    plain = plain and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    known = kind in _SIZED or hasattr(np, kind.replace("bool", "bool_"))
    check(
        plain and known,
        f"{str(path)!r} must hold plain, dense tensors",
        fix="Save tensor.contiguous(), or leave it out.",
        tensor=name,
        dtype=kind,
        shape=tuple(tensor.shape),
    )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if kind in _SIZED:
        sized, known_as = _SIZED[kind]
        bits = torch.int16 if sized is np.int16 else torch.uint8
        return cast(np.ndarray, tensor.contiguous().view(bits).numpy().view(known_as))
    return cast(np.ndarray, tensor.numpy())
