"""The public names that flaxstab and ported code rely on, with their parameters and defaults."""

import enum
import inspect
import re
import typing
from collections.abc import Iterator
from importlib import import_module

from flaxstab.parity._record._baseline import Signature

MODULES = (
    "flax.nnx", "flax.nnx.initializers", "optax", "jax.nn", "jax.nn.initializers", "jax.random",
    "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.optim", "torch.optim.lr_scheduler",
    "torch.nn.utils", "flaxstab.attention", "flaxstab.blocks", "flaxstab.dropout",
    "flaxstab.functional", "flaxstab.initializers", "flaxstab.interop", "flaxstab.linear",
    "flaxstab.models", "flaxstab.norms", "flaxstab.optim", "flaxstab.parity", "flaxstab.surgery",
    "flaxstab.training",
)  # fmt: skip
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LONGEST = 80


def surface() -> tuple[Signature, ...]:
    """Returns every public class and function of the modules that can be imported."""
    found = [signature for module in MODULES for signature in _module(module)]
    return tuple(sorted(found))


def _module(name: str) -> Iterator[Signature]:
    try:
        module = import_module(name)
    except Exception:  # absent, or broken: every name of it is gone, which is the result
        return
    for attribute in dir(module):
        value = getattr(module, attribute, None)
        if not attribute.startswith("_") and callable(value) and not _is_typing(value):
            yield Signature(f"{name}.{attribute}", _parameters(value))


def _is_typing(value: object) -> bool:
    """Whether something is imported for annotations alone, and no part of a module's surface."""
    # An Annotated[...] can be called in one Python and says another module in the next.
    annotation = typing.get_origin(value) is not None
    origin = getattr(value, "__module__", "")
    return annotation or origin in ("typing", "typing_extensions", "collections.abc")


def _parameters(value: object) -> tuple[str, ...]:
    """Returns parameters as they are written, without types; ``('?',)`` of built-in functions."""
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return ("?",)  # Python's own, another in each version
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ("?",)
    found, keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            found.append("*")
        keyword = parameter.kind in (
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_POSITIONAL,
        )
        words = _stars(parameter) + parameter.name
        if parameter.default is not inspect.Parameter.empty:
            words += f"={_default(parameter.default)}"
        found.append(words)
    return tuple(found)


def _stars(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""


def _default(value: object) -> str:
    """Returns a default as it would be written; of functions their name."""
    name = getattr(value, "__qualname__", "")
    if name and callable(value):
        return str(name)
    words = _ADDRESS.sub("", " ".join(repr(value).split()))
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."
