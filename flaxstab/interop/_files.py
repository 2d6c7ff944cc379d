"""Weights in files: safetensors, in one piece or several, and what ``torch.save`` writes."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab.interop import _safetensors, _sharded
from flaxstab.interop._flattened import Flattened
from flaxstab.interop._flax_layout import TAG, is_tagged, to_torch_names
from flaxstab.interop._matching import Rename
from flaxstab.interop._report import LoadReport
from flaxstab.interop._state_dict import load_state_dict, state_dict
from flaxstab.interop._torch import read_pickled

Location = str | os.PathLike[str]

_SAFE = ".safetensors"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_OF_TORCH = {"format": "pt"}  # what transformers asks of a file


def read_tensors(path: Location, *, key: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name, in their own dtypes.

    Safetensors are read without PyTorch. What ``torch.save`` wrote is read by ``torch.load`` with
    ``weights_only=True``: none of its code runs. Before memory is taken for what a file says that
    it holds, that is compared with the file's size.

    Args:
      path: one of: a ``.safetensors`` file; the ``.safetensors.index.json`` of several, or the
        folder in which it or a single file lies; a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.
      key: for PyTorch's files, the entry that holds the tensors, such as ``'model'``; ``None``
        takes the only one that holds tensors and nothing else. Not for safetensors.

    Returns:
      Arrays, bfloat16 and float8 as those of ``ml_dtypes``. Those of one safetensors file share
      one piece of memory.

    Raises:
      ValueError: if the file is not there, is damaged, holds anything but tensors, or may hold
        more than one set of them. It says what to do.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save_safetensors(model, folder + "/a.safetensors")
      ...     {name: array.shape for name, array in read_tensors(path).items()}
      {'weight': (5, 2), 'bias': (5,)}
    """
    tensors, metadata = read(path, key=key)
    check(
        not is_tagged(metadata),
        "the file must hold PyTorch's names, got Flax's",
        fix="Load it with load_safetensors, or turn it with flaxstab convert.",
        file=str(path),
    )
    return tensors


def load_safetensors(
    model: nnx.Module,
    path: Location,
    *,
    strict: bool = True,
    rename: Rename | None = None,
    flattened: Flattened | None = None,
) -> LoadReport:
    """Loads a safetensors file into a model, in place, all or nothing; without PyTorch.

    Args:
      model: as of :func:`load_state_dict`.
      path: a ``.safetensors`` file with PyTorch's names, or with Flax's as ``flaxstab convert
        --layout flax`` writes it; or several, as of :func:`read_tensors`.
      strict: as of :func:`load_state_dict`.
      rename: as of :func:`load_state_dict`.
      flattened: as of :func:`load_state_dict`; not for a file with Flax's names.

    Raises:
      ValueError: as :func:`read_tensors` and :func:`load_state_dict`. The model is then unchanged.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save_safetensors(model, folder + "/model.safetensors")
      ...     print(load_safetensors(model, path))
      2 tensors loaded
    """
    place = _place(path)
    fix = "Use load_state_dict(model, read_tensors(path)) for PyTorch's files."
    check(_is_safe(place), "path must name safetensors", fix=fix, path=str(path))
    tensors, metadata = read(place, mapped=True)  # the model copies them
    if is_tagged(metadata):
        tensors, flattened = to_torch_names(model, tensors), None
    return load_state_dict(model, tensors, strict=strict, rename=rename, flattened=flattened)


def save_safetensors(
    model: nnx.Module,
    path: Location,
    *,
    max_shard_size: int | None = None,
    flattened: Flattened | None = None,
) -> Path:
    """Writes a model's :func:`state_dict` as safetensors, which PyTorch's models load.

    In torch: ``module.load_state_dict(safetensors.torch.load_file(path))``. No file is in its place
    before everything is written.

    Args:
      model: as of :func:`state_dict`.
      path: ends in ``.safetensors``; what was saved by this name before is replaced, in one file
        or several.
      max_shard_size: the most bytes of numbers in one file; ``None`` = any number. More than that
        make files ``NAME-00001-of-00002.safetensors`` and the index
        ``NAME.safetensors.index.json``, as Hugging Face's libraries read them.
      flattened: as of :func:`state_dict`.

    Returns:
      The path of the file or of the index.

    Raises:
      ValueError: as :func:`state_dict`, or if the path cannot be written.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(model, folder + "/a.safetensors", max_shard_size=40).name
      'a.safetensors.index.json'
    """
    place, tensors = checked_target(path), state_dict(model, flattened=flattened)
    whole = 1 + sum(array.nbytes for array in tensors.values())
    size = whole if max_shard_size is None else max_shard_size
    return _sharded.write(place, tensors, _OF_TORCH, size)


def read(
    path: Location, *, key: str | None = None, mapped: bool = False
) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Returns a file's tensors, with Flax's names if it has those, and its metadata.

    Args:
      path: as of :func:`read_tensors`.
      key: as of :func:`read_tensors`.
      mapped: whether safetensors may be read later, as they are used.
    """
    place = _place(path)
    check(
        key is None or not _is_safe(place),
        "key must be None for safetensors, which hold one set of tensors",
        fix="Leave it out.",
        file=str(path),
        key=key,
    )
    if place.name.endswith(_SAFE + _sharded.INDEX):
        return _sharded.read(place, mapped=mapped)
    if place.suffix == _SAFE:
        return _safetensors.read(place, mapped=mapped)
    check(
        not place.name.endswith(_sharded.INDEX),
        "an index must be one of safetensors, got one of PyTorch's files, which is not supported",
        fix="Load its files one by one with torch.load(weights_only=True), or save them as "
        "safetensors.",
        file=str(path),
    )
    check(
        place.suffix in _PICKLED,
        f"a file of tensors must end in {_SAFE}, {_SAFE}{_sharded.INDEX}, {', '.join(_PICKLED)}",
        path=str(path),
    )
    return read_pickled(place, key), {}


def write_one(path: Path, tensors: Mapping[str, np.ndarray], *, flax: bool) -> None:
    """Writes a file by PyTorch's names, or by Flax's with the tag that says so."""
    _safetensors.write(path, tensors, TAG if flax else _OF_TORCH)


def read_one(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file of any name, by whatever names it has."""
    return _safetensors.read(path)[0]


def checked_target(path: Location) -> Path:
    """Returns where a file shall be written, if that is a place for safetensors."""
    place = Path(path)
    check(place.suffix == _SAFE, f"path must end in {_SAFE}", path=str(path))
    return place


def _is_safe(place: Path) -> bool:
    """Whether a file is one of safetensors, or their index."""
    return place.name.endswith((_SAFE, _SAFE + _sharded.INDEX))


def _place(path: Location) -> Path:
    """Returns the file that is meant; of a folder its only set of safetensors."""
    place = Path(path)
    check(place.exists(), "path must be that of a file", fix="There is none.", path=str(path))
    if not place.is_dir():
        check(place.stat().st_size > 0, "the file must not be empty", file=str(path),
              fix="Fetch it again.")  # fmt: skip
        return place
    found = sorted(place.glob("*" + _SAFE + _sharded.INDEX)) or sorted(place.glob("*" + _SAFE))
    check(
        len(found) == 1,
        "a folder must hold one index of safetensors, or one file of them",
        fix="Name the file itself.",
        folder=str(path),
        found=[file.name for file in found],
    )
    return found[0]
