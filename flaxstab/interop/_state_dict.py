"""PyTorch state_dicts in and out, by walking the model and its layer types."""

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._typing import Array
from flaxstab.interop._entries import Entry, Layer, tensors_of
from flaxstab.interop._report import LoadReport, Path, Rename, sort_out
from flaxstab.interop._rules import Rule, rule_of


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns a model's parameters and statistics by PyTorch's names, in PyTorch's layouts.

    Each layer type has its rule; nothing is guessed from names or ranks. ``nnx.Sequential`` is
    transparent, as ``torch.nn.Sequential`` is.

    Args:
      model: a module built of flaxstab's or stock NNX layers and registered types.

    Returns:
      Arrays by name, sorted by module. A module that the model holds twice appears once, under
      its first name.

    Raises:
      ValueError: if a variable belongs to a module type without a rule, or a layer is one that
        PyTorch has not.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> {k: v.shape for k, v in state_dict(linear.Linear(2, 5, rngs=nnx.Rngs(0))).items()}
      {'weight': (5, 2), 'bias': (5,)}
    """
    return tensors_of(found.layer for found in walk(model) if not found.again)


def load_state_dict(
    model: nnx.Module,
    state_dict: Mapping[str, object],
    *,
    strict: bool = True,
    rename: Rename | None = None,
) -> LoadReport:
    """Loads a PyTorch state_dict into a model, in place, all or nothing.

    Args:
      model: a module built of flaxstab's or stock NNX layers and registered types.
      state_dict: arrays or CPU tensors by PyTorch's names, in PyTorch's layouts. A layer that the
        model holds twice may come under either name or, with equal numbers, under both.
      strict: whether every tensor and every variable must find its counterpart. Otherwise what
        fits is loaded and the report says what did not.
      rename: from a name in ``state_dict`` to the name in this model.

    Returns:
      What became of every tensor and every variable.

    Raises:
      ValueError: if something does not fit under ``strict``, or a variable belongs to a module
        type without a rule, or a layer is one that PyTorch has not. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> print(load_state_dict(model, state_dict(model)))
      2 tensors loaded
    """
    # The first names first: a tensor that is missing under all its names is missing there.
    found = sorted(walk(model), key=lambda walked: walked.again)
    loading = sort_out([walked.layer for walked in found], state_dict, rename)
    if strict:
        loading.require("Pass rename= for other names, or strict=False to load what fits.")
    variables = {path: v for walked in found for path, v in walked.variables.items()}
    # A copy: JAX may share a NumPy array's memory, and torch changes its tensors in place
    # (test_the_model_does_not_share_memory_with_the_state_dict).
    new = {p: jnp.array(a, variables[p][...].dtype) for p, a in loading.values.items()}
    for path, value in new.items():
        variables[path][...] = value
    return loading.report


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns every module of a model by the name that PyTorch would give it; '' is the model.

    Args:
      model: any module. ``nnx.Sequential`` is transparent, as ``torch.nn.Sequential`` is; a list
        of modules goes by its attribute's name.
    """
    modules: dict[Path, nnx.Module] = {**dict(nnx.iter_modules(model))}
    named: dict[str, nnx.Module] = {}
    for path in sorted(modules, key=_sort_key):
        # A Sequential comes before its list of layers, which has no name of its own.
        named.setdefault(_name(path, modules), modules[path])
    return named


class _Walked(NamedTuple):
    """A layer of an NNX model, and its variables by their path in the model.

    Attributes:
      layer: the layer's values and how they travel.
      variables: the variables by path.
      again: whether the model holds this module under an earlier name as well.
    """

    layer: Layer
    variables: Mapping[Path, nnx.Variable[Array]]
    again: bool


def walk(model: nnx.Module) -> list[_Walked]:
    """Returns every layer with a rule, under each of its names.

    Raises:
      ValueError: if a variable of the model belongs to none of them.
    """
    first = dict(nnx.iter_modules(model))
    shared: list[list[Path]] = [list(group) for group in nnx.find_duplicates(model)]
    modules = {path: m for known, m in first.items() for path in _paths(known, shared)}
    found = [
        _walked(_prefix(path, modules), path, modules[path], rule, shared)._replace(
            again=path not in first
        )
        for path, rule in _ruled(modules)
    ]
    carried = {p for walked in found for path in walked.variables for p in _paths(path, shared)}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        if path not in carried:
            owner = next(path[:n] for n in reversed(range(len(path))) if path[:n] in modules)
            raise ValueError(
                "every variable must belong to a module type with a rule that carries it, "
                f"got {'.'.join(map(str, path))!r} {variable.shape} of "
                f"{type(modules[owner]).__name__}. "
                "Call flaxstab.interop.register for its module's type."
            )
    return found


def _ruled(modules: Mapping[Path, nnx.Module]) -> Iterator[tuple[Path, Rule]]:
    """Yields the modules with a rule that are not parts of another one with a rule."""
    owner: Path | None = None
    for path in sorted(modules, key=_sort_key):
        rule = rule_of(modules[path])
        if rule is None or (owner is not None and path[: len(owner)] == owner):
            continue
        owner = path if rule.owns else owner
        reason = rule.refusal(modules[path])
        if reason:
            raise ValueError(
                f"{reason}, got {'.'.join(map(str, path))!r} {type(modules[path]).__name__}."
            )
        yield path, rule


def _walked(
    prefix: str, path: Path, module: nnx.Module, rule: Rule, shared: list[list[Path]]
) -> _Walked:
    entries: list[Entry] = []
    variables: dict[str, nnx.Variable[Array]] = {}
    for entry in rule.entries(module):
        found = {name: _variable(module, name) for name in entry.variables}
        held = {name: variable for name, variable in found.items() if variable is not None}
        if len(held) == len(found):
            entries.append(entry)
            variables |= held
            _check_rank(path, module, entry, held)
    paths = {
        name: min(_paths((*path, *name.split(".")), shared), key=_sort_key) for name in variables
    }
    values = {name: np.asarray(variable[...]) for name, variable in variables.items()}
    layer = Layer(prefix, tuple(entries), values, paths, rule.ignored)
    return _Walked(layer, {paths[name]: v for name, v in variables.items()}, again=False)


def _check_rank(
    path: Path, module: nnx.Module, entry: Entry, held: Mapping[str, nnx.Variable[Array]]
) -> None:
    for name, variable in held.items():
        if entry.rank is not None and variable.ndim != entry.rank:
            place = ".".join(map(str, (*path, name)))
            raise ValueError(
                f"a layer must hold variables of its own, got {place!r} {variable.shape} of "
                f"{type(module).__name__}: nnx.vmap or nnx.scan stacks them. "
                "Take them apart into one layer each, as flaxstab.models.unstacked does."
            )


def _variable(module: nnx.Module, name: str) -> nnx.Variable[Array] | None:
    """Returns a variable of a module or, by a name with dots, of one of its submodules."""
    found: object = reduce(lambda m, part: vars(m)[part], name.split("."), module)
    return found if isinstance(found, nnx.Variable) else None


def _paths(path: Path, shared: list[list[Path]]) -> list[Path]:
    """Returns a path with every other one that leads to the same node.

    Args:
      path: where a module or variable lies.
      shared: groups of paths to one node, as ``nnx.find_duplicates`` returns them.
    """
    found = [path]
    for known in found:  # grows while it is walked
        for group in shared:
            for start in [start for start in group if known[: len(start)] == start]:
                others = (other for other in group if other[: len(start)] != start)
                new = [(*other, *known[len(start) :]) for other in others]
                found += [other for other in new if other not in found]
    return found


def _name(path: Path, modules: Mapping[Path, nnx.Module]) -> str:
    hidden = [isinstance(modules.get(path[:n]), nnx.Sequential) for n in range(len(path))]
    return ".".join(str(p) for p, is_layers in zip(path, hidden, strict=True) if not is_layers)


def _prefix(path: Path, modules: Mapping[Path, nnx.Module]) -> str:
    name = _name(path, modules)
    return f"{name}." if name else ""


def _sort_key(path: Path) -> tuple[tuple[bool, int, str], ...]:
    """Orders numbers as numbers: 'blocks.2' before 'blocks.10'."""
    return tuple((isinstance(p, str), p if isinstance(p, int) else 0, str(p)) for p in path)
