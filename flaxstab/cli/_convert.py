"""``flaxstab convert``: a model's weights from one file to another, PyTorch's layout or Flax's."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flaxstab.cli._command import FAILED, PASSED, refuse

if TYPE_CHECKING:
    import numpy as np
    from flax import nnx

    from flaxstab.cli._command import Actions

    Tensors = Mapping[str, np.ndarray]
    Rename = Callable[[str], str] | None

MODELS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "vit_tiny_patch16_224", "vit_small_patch16_224",
)  # fmt: skip
_HEADS = {"resnet": "fc", "vit": "head"}


class _DifferenceError(Exception):
    """What was written is not what was read."""


def add(actions: "Actions") -> None:
    """Adds the command to the parser."""
    convert = actions.add_parser(
        "convert",
        help="turn a file of PyTorch weights into safetensors, in PyTorch's or Flax's layout",
        description="Reads the weights of a model, says what became of every tensor, and writes "
        "them as safetensors, in the dtypes that they have. Nothing is written unless all of them "
        "fit the model.",
        epilog="exit code: 0 written; 1 the weights do not fit the model, or --check found a "
        "difference, and nothing was written; 2 refused",
    )
    convert.add_argument(
        "source", metavar="IN",
        help="a .safetensors file, the .safetensors.index.json of several or their folder, or a"
        " .pt, .pth, .bin or .ckpt file of tensors, with the names of torchvision or timm; or what"
        " --layout flax wrote",
    )  # fmt: skip
    convert.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    convert.add_argument(
        "--model", required=True, choices=MODELS, metavar="NAME", help=f"one of {', '.join(MODELS)}"
    )
    convert.add_argument(
        "--num-classes", type=int, default=None, metavar="N",
        help="classes of the model (default: those of the file)",
    )  # fmt: skip
    convert.add_argument(
        "--layout", choices=("torch", "flax"), default="torch",
        help="names and layouts of OUT: those of flaxstab.interop.state_dict (default), or the"
        " paths and layouts of the Flax model's variables",
    )  # fmt: skip
    convert.add_argument(
        "--key", default=None, help="which entry of a .pt file holds the tensors, such as 'model'"
    )
    convert.add_argument(
        "--table", action="store_true", help="print a line for every tensor, not a summary"
    )
    convert.add_argument(
        "--check", action="store_true",
        help="read OUT again and compare every tensor bit for bit with IN",
    )  # fmt: skip
    convert.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    try:
        return _convert(given)
    except _DifferenceError as found:
        sys.stdout.write(f"check: {found}; nothing was written\n")
        return FAILED
    except (ValueError, OSError) as error:
        return refuse(str(error))


def _convert(given: argparse.Namespace) -> int:
    from flaxstab._files import write_whole
    from flaxstab.interop import _files
    from flaxstab.interop._flax_layout import is_tagged, to_flax_names, to_torch_names

    target = _files.checked_target(given.target)
    tensors, metadata = _files.read(given.source, key=given.key)
    rename = _rename(given.model)
    model = _model(given, tensors, rename)
    if is_tagged(metadata):
        tensors = to_torch_names(model, tensors)
    arrays, report = to_flax_names(model, tensors, rename)
    sys.stdout.write(f"{report.table() if given.table else report}\n")
    if not report.complete:
        sys.stdout.write(f"the weights do not fit {given.model}; nothing was written\n")
        return FAILED
    flax = given.layout == "flax"
    wanted = {
        entry.name: tensors[entry.source] for entry in report.entries if entry.outcome == "loaded"
    }

    def write(unfinished: Path) -> None:
        _files.write_one(unfinished, arrays if flax else to_torch_names(model, arrays), flax=flax)
        if given.check:
            found = _files.read_one(unfinished)
            _compare(to_torch_names(model, found) if flax else found, wanted)

    write_whole(target, write)
    checked = f", {len(wanted)} tensors read again, equal bit for bit" if given.check else ""
    sys.stdout.write(f"{target} written{checked}\n")
    return PASSED


def _rename(model: str) -> "Rename":
    from flaxstab import models

    return models.from_timm if model.startswith("vit") else None


def _model(given: argparse.Namespace, tensors: "Tensors", rename: "Rename") -> "nnx.Module":
    """Builds the model with as many classes as asked for, or as the file's last layer has."""
    from flax import nnx

    from flaxstab import models

    head = _HEADS[given.model.split("_")[0].rstrip("0123456789")]
    classes = given.num_classes
    if classes is None:
        named = {name if rename is None else rename(name): a for name, a in tensors.items()}
        biases = [a for name, a in named.items() if name == f"{head}.bias" and a.ndim == 1]
        if not biases:
            raise ValueError(
                f"the file must hold {head}.bias, which says how many classes {given.model} has, "
                f"got {', '.join(sorted(named)[:3])}, ... Pass --num-classes."
            )
        classes = len(biases[0])
    make: Callable[..., nnx.Module] = getattr(models, given.model)
    return _promised(lambda: make(classes, rngs=nnx.Rngs(0)))


def _promised(make: "Callable[[], nnx.Module]") -> "nnx.Module":
    """Returns a model that nothing was drawn for: all its numbers are one 0."""
    import jax
    import numpy as np
    from flax import nnx

    model: nnx.Module = nnx.eval_shape(make)
    promised = nnx.state(model, nnx.Not(nnx.RngState))
    zeros = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), promised)
    nnx.update(model, zeros)
    return model


def _compare(found: "Tensors", wanted: "Tensors") -> None:
    """Raises :class:`_DifferenceError` unless both hold the same bits by the same names."""
    import numpy as np

    for name in sorted(found.keys() | wanted.keys()):
        pair = [tensors.get(name) for tensors in (found, wanted)]
        bits = [
            (a.dtype, a.shape, np.ascontiguousarray(a).tobytes()) for a in pair if a is not None
        ]
        if len(bits) < 2 or bits[0] != bits[1]:
            raise _DifferenceError(f"{name} is not what IN holds")
