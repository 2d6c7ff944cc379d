"""Training runs on disk, by orbax: a checkpoint is whole, or it does not count."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else; the message is for the user."""


class Content(NamedTuple):
    """What is in a checkpoint: the list beside its folder.

    Attributes:
      about: what the user saved beside the arrays.
      arrays: each array's dtype and shape.
      files: each file's checksum.
    """

    about: dict[str, object]
    arrays: dict[str, str]
    files: dict[str, str]


class Checkpoints:
    """The last checkpoints of a training run, each a folder by orbax and a list of what is in it.

    Save the state of model and optimizer together: parameters, statistics, keys and counts of
    dropout, moments and step are all in it, and come back bit for bit::

        checkpoints = Checkpoints(Path("runs/mine/checkpoints"))
        checkpoints.save(step, nnx.state((model, optimizer)), about={"width": 64})

        step = checkpoints.latest()
        restored = checkpoints.restore(step, nnx.state((model, optimizer)))
        nnx.update((model, optimizer), restored)

    The list is written last, and names each file with its checksum and each array with its dtype
    and shape. So a checkpoint without a list is unfinished and does not count; orbax itself would
    read a flipped bit, and would convert an array to another dtype, without a word. Files hold
    arrays and JSON: nothing in them is executed.

    Args:
      folder: where they are; it is created when the first is saved.
      keep: how many there are at most; older ones are deleted.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder.absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, in order."""
        lists = self.folder.glob("*.json")
        return sorted(int(path.stem) for path in lists if re.fullmatch("[0-9]+", path.stem))

    def latest(self) -> int:
        """Returns the step of the last finished checkpoint.

        Raises:
          CheckpointError: if there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"there is no finished checkpoint in {self.folder}")
        return steps[-1]

    def save(self, step: int, tree: PyTree, about: Mapping[str, object]) -> None:
        """Saves a tree of arrays, and what to know of it as JSON.

        Does nothing if that step is there already.
        """
        if step in self.steps():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._path(step), ignore_errors=True)  # it has no list: it is unfinished
        arrays = _named(tree)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            orbax.save(self._path(step), args=ocp.args.StandardSave(arrays))
        kinds = {name: _kind(array) for name, array in arrays.items()}
        content = Content(dict(about), kinds, _checksums(self._path(step)))
        partial = self.folder / f".{step}.json.partial"
        partial.write_text(json.dumps({"format": FORMAT, **content._asdict()}, indent=1))
        os.replace(partial, self._list(step))
        self._clear()

    def about(self, step: int) -> dict[str, object]:
        """Returns what was saved beside the arrays.

        Raises:
          CheckpointError: if the checkpoint is damaged.
        """
        return self._content(step).about

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Returns the saved arrays in a tree like ``like``, each on the same devices as there.

        Raises:
          CheckpointError: if the checkpoint is damaged, or an array has another name, shape or
            dtype than in ``like``.
        """
        content = self._content(step)
        wanted = _named(like)
        kinds = {name: _kind(array) for name, array in wanted.items()}
        difference = first_difference(content.arrays, kinds)
        if difference:
            raise CheckpointError(f"checkpoint {step} is of another model: {difference}")
        if _checksums(self._path(step)) != content.files:
            raise self._damaged(step)
        abstract = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for name, a in wanted.items()
        }
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            arrays = orbax.restore(self._path(step), args=ocp.args.StandardRestore(abstract))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _list(self, step: int) -> Path:
        return self.folder / f"{step}.json"

    def _content(self, step: int) -> Content:
        try:
            content = json.loads(self._list(step).read_text())
            form, parts = content["format"], Content(*(content[name] for name in Content._fields))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(step) from error
        if form != FORMAT:
            raise CheckpointError(f"checkpoint {step} must have format {FORMAT}, got {form}")
        if not all(isinstance(part, dict) for part in parts):
            raise self._damaged(step)
        return parts

    def _damaged(self, step: int) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} is damaged. Delete {self._list(step)} to go on from an earlier one"
        )

    def _clear(self) -> None:
        """Deletes old checkpoints, and what unfinished ones have left."""
        for step in self.steps()[: -self.keep]:
            self._list(step).unlink()
        for path in list(self.folder.iterdir()):
            known = re.fullmatch(r"([0-9]+)(\.orbax-checkpoint-tmp.*)?", path.name)
            if known and (known[2] or not self._list(int(known[1])).exists()):
                shutil.rmtree(path)


def first_difference(saved: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """Returns where two mappings differ, in words; '' if nowhere."""
    for name in sorted({*saved, *wanted}):
        there, here = (repr(m[name]) if name in m else "missing" for m in (saved, wanted))
        if there != here:
            return f"{name} is {there} in the checkpoint and {here} here"
    return ""


def _named(tree: PyTree) -> dict[str, jax.Array]:
    """Returns a tree's leaves by name, such as ``model.embed.embedding``."""
    flat, _ = jax.tree.flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat)
    return {name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, flat, strict=True)}


def _kind(array: jax.Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums[path.relative_to(folder).as_posix()] = digest
    return sums
