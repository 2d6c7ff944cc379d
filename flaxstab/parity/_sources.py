"""Modules and functions as the Python that makes them again."""

import ast
import builtins
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import PyTree

_LINES = {  # how a name is imported by convention
    "jax": "import jax",
    "jnp": "import jax.numpy as jnp",
    "np": "import numpy as np",
    "nnx": "from flax import nnx",
    "optax": "import optax",
    "torch": "import torch",
}
_HOMES = (  # where functions and classes are public, and by which name the module goes
    ("flax.nnx", "nnx"), ("torch.nn", "torch.nn"), ("torch.nn.functional", "torch.nn.functional"),
    ("torch", "torch"), ("jax.nn", "jax.nn"), ("jax.numpy", "jnp"), ("optax", "optax"),
)  # fmt: skip
_SKIPPED = {"rngs", "device", "dtype", "use_running_average", "deterministic"}  # of torch, or modes
_RENAMED = {  # constructor arguments that torch keeps under another name
    "MultiheadAttention": {"bias": "in_proj_bias", "add_bias_kv": "bias_k"},
}


class Call(NamedTuple):
    """An expression that makes a module or names a function.

    Attributes:
      name: what is called, or the whole expression if there are no arguments to change.
      arguments: by name, as the expressions of their values; None: nothing is called.
      values: the arguments that are numbers or tuples of numbers, to be varied.
    """

    name: str
    arguments: Mapping[str, str] | None = None
    values: Mapping[str, object] = {}

    @property
    def text(self) -> str:
        """The expression."""
        if self.arguments is None:
            return self.name
        return f"{self.name}({', '.join(f'{n}={text}' for n, text in self.arguments.items())})"

    def varied(self, values: Mapping[str, object]) -> "Call":
        """Returns the call with other values of some arguments."""
        texts = {n: repr(value) for n, value in values.items()}
        return Call(self.name, {**(self.arguments or {}), **texts}, {**self.values, **values})


def source_of(target: object, given: str, argument: str) -> Call:
    """Returns how to make a module again, or how to name a function.

    Args:
      target: a module, or a function that can be imported.
      given: the caller's own expression; '' to find one.
      argument: what the caller passes such an expression as, for errors.

    Raises:
      ValueError: if the target cannot be made from what it holds.
    """
    if given:
        imports(given)  # refuses what cannot be imported
        return Call(given)
    if not is_module(target):
        return Call(_public(target, argument))
    layers = _in_sequence(target)
    if layers is not None:
        inner = (source_of(layer, "", argument).text for layer in layers)
        return Call(f"{_public(type(target), argument)}({', '.join(inner)})")
    return _made(_call(target, argument), argument)


def _in_sequence(target: PyTree) -> Sequence[object] | None:
    """Returns the layers of a Sequential of either framework; None of anything else."""
    import torch

    if type(target) is nnx.Sequential:
        return [*target.layers]
    return [*target] if type(target) is torch.nn.Sequential else None


def _made(call: Call, argument: str) -> Call:
    """Returns a call that can be carried out: some modules keep what excludes each other."""
    arguments = dict(call.arguments or {})
    for left_out in ("", *arguments):
        some = Call(
            call.name,
            {n: text for n, text in arguments.items() if n != left_out},
            {n: value for n, value in call.values.items() if n != left_out},
        )
        with suppress(Exception):  # whatever a constructor refuses with
            evaluated(some.text)
            return some
    raise ValueError(
        f"a script must be able to make both sides, got {call.text}, which cannot be carried out. "
        f"Pass {argument}='my_models.Net(nnx.Rngs(0))', or what makes yours."
    )


def _call(target: object, argument: str) -> Call:
    values = dict(_held(target, argument))
    texts = {name: _literal(value, name, argument) for name, value in values.items()}
    plain = {n: v for n, v in values.items() if isinstance(v, int | float | tuple)}
    if "rngs" in _parameters(target):
        texts["rngs"] = "nnx.Rngs(0)"
    return Call(_public(type(target), argument), texts, plain)


def is_module(target: object) -> bool:
    """Whether a side is a module of either framework."""
    import torch

    return isinstance(target, nnx.Module | torch.nn.Module)


def _parameters(module: object) -> Mapping[str, inspect.Parameter]:
    # That of the class itself may be its metaclass's: (*args, **kwargs).
    found = list(inspect.signature(type(module).__init__).parameters.values())
    bound = bool(found) and found[0].kind is not inspect.Parameter.VAR_POSITIONAL
    return {p.name: p for p in found[bound:] if not p.name.startswith("_")}


def _held(module: object, argument: str) -> Iterator[tuple[str, object]]:
    """Yields the constructor's arguments that are not the defaults, as the module keeps them."""
    for name, parameter in _parameters(module).items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            _unknown(type(module), f"*{name}", argument)
        if name in _SKIPPED or name.endswith("_init"):  # the values are given, not drawn
            continue
        key = _RENAMED.get(type(module).__name__, {}).get(name, name)
        value = getattr(module, key, parameter)
        if value is parameter and parameter.default is parameter.empty:
            value = _features(module) or _unknown(type(module), name, argument)
        if _is_array(value) or (value is None and isinstance(parameter.default, bool)):
            value = value is not None
        if value is not parameter and not _same(value, parameter.default):
            yield name, value


def _features(module: object) -> int:
    """Returns the last size of a module's variables: a guess, which its arrays must fit."""
    variables = [v for v in vars(module).values() if isinstance(v, nnx.Variable)]
    return next((v[...].shape[-1] for v in variables if v[...].ndim), 0)


def _is_array(value: object) -> bool:
    import torch

    return isinstance(value, nnx.Variable | torch.Tensor)


def _same(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _literal(value: object, name: str, argument: str) -> str:
    """Returns an expression of a constructor's argument."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, tuple | list):
        items = [_literal(item, name, argument) for item in value]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    if isinstance(value, type | np.dtype) and hasattr(jnp, np.dtype(value).name):
        return f"jnp.{np.dtype(value).name}"
    return _public(value, argument)


def _public(target: object, argument: str) -> str:
    """Returns the name by which a function or class can be imported."""
    name = str(getattr(target, "__name__", ""))
    for module, spelled in _HOMES:
        if name and getattr(importlib.import_module(module), name, None) is target:
            return f"{spelled}.{name}"
    parts = str(getattr(target, "__module__", "")).split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        held = sys.modules.get(module)
        if name and module != "__main__" and getattr(held, name, None) is target:
            return f"{module}.{name}"
    return _unknown(target, "a name that can be imported", argument)


def _unknown(target: object, what: str, argument: str) -> NoReturn:
    name = getattr(target, "__name__", type(target).__name__)
    raise ValueError(
        f"a script must be able to make both sides, got {name}, which does not tell {what}. "
        f"Pass {argument}='my_models.Net(nnx.Rngs(0))', or what makes yours."
    )


def imports(*expressions: str) -> list[str]:
    """Returns the lines that import what some expressions name.

    Args:
      *expressions: Python.

    Raises:
      ValueError: if one is no expression, or names what cannot be imported.
    """
    lines: set[str] = set()
    for expression in expressions:
        try:
            tree = ast.parse(expression.strip(), mode="eval")
        except SyntaxError as error:
            raise ValueError(
                f"a source must be a Python expression, got {expression!r}: {error.msg}."
            ) from None
        bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        bound |= {n.id for n in ast.walk(tree) if _is_stored(n) and isinstance(n, ast.Name)}
        lines |= {_line(name) for name in _names(tree) if name.split(".")[0] not in bound}
    return sorted(lines - {""})


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _names(tree: ast.AST) -> Iterator[str]:
    """Yields names with their attributes: of ``a.b.c(d)`` first ``a.b.c`` and then ``d``."""
    for node in ast.iter_child_nodes(tree):
        dotted = _dotted(node)
        if dotted:
            yield dotted
        else:
            yield from _names(node)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _line(name: str) -> str:
    parts = name.split(".")
    if parts[0] in _LINES:
        return _LINES[parts[0]]
    if hasattr(builtins, parts[0]):
        return ""
    modules = [m for m in (".".join(parts[:end]) for end in range(len(parts), 0, -1)) if _exists(m)]
    fix = "Name it with the module that it can be imported from: my_models.Net."
    check(bool(modules), "a source must name what can be imported", name=name, fix=fix)
    return f"import {modules[0]}"


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def folders(lines: list[str]) -> list[str]:
    """Returns the folders, apart from installed packages, that imported modules lie in.

    Args:
      lines: as :func:`imports` returns them.
    """
    found = set()
    for line in lines:
        name = line.split()[1]
        spec = find_spec(name)
        if (
            spec is None
            or not spec.origin
            or "site-packages" in spec.origin
            or "." not in spec.origin
        ):
            continue
        depth = name.count(".") + 1 + (Path(spec.origin).name == "__init__.py")
        folder = Path(spec.origin).parents[depth - 1]
        if not str(folder).startswith(sys.base_prefix):
            found.add(str(folder))
    return sorted(found)


def evaluated(expression: str) -> object:
    """Returns the value of an expression that names what it needs.

    Args:
      expression: made here, or given by the caller for their own script.
    """
    names: dict[str, object] = {}
    for line in imports(expression):
        words = line.split()
        if words[0] == "from":
            names[words[3]] = importlib.import_module(f"{words[1]}.{words[3]}")
        elif "as" in words:
            names[words[3]] = importlib.import_module(words[1])
        else:
            importlib.import_module(words[1])
            root = words[1].split(".")[0]
            names[root] = importlib.import_module(root)
    return eval(expression, names)  # noqa: S307  as the script itself will do
