"""Parameters by their path in the model, which every form of a tree of them shares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import optax
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array, PyTree
from flaxstab.functional._paths import Names, absent, by_path, name_of, path_names

Path: TypeAlias = Names
T = TypeVar("T")


class Parameter(NamedTuple):
    """A leaf of a model's parameters and where it belongs.

    Attributes:
      path: its names from the model down, the same for ``nnx.State`` and pure dicts.
      shape: its shape.
      variable: the ``nnx.Param`` that holds it.
      owner: the module that holds that; with lists and dicts of parameters, the one around them.
      others: the same leaf at the other places of a shared variable.
    """

    path: Path
    shape: tuple[int, ...]
    variable: nnx.Variable[Array]
    owner: nnx.Module
    others: tuple["Parameter", ...] = ()

    @property
    def name(self) -> str:
        """The attribute it is held as; that of the list or dict it is in, if it is in one."""
        return next((name for name in reversed(self.path) if not name.isdecimal()), "")


def parameters(model: nnx.Module) -> Iterator[Parameter]:
    """Yields every leaf of every ``nnx.Param`` of a model, a shared one once."""
    check(
        isinstance(model, nnx.Module),
        "model must be an nnx.Module",
        fix="Pass the built model itself, not its state.",
        model_type=type(model).__name__,
    )
    modules: dict[tuple[object, ...], object] = {**dict(nnx.iter_modules(model))}
    shared = _shared(modules)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        owner = _owner(path, modules)
        names = tuple(str(name) for name in path)
        for below, leaf in jax.tree_util.tree_leaves_with_path(variable.get_value()):
            rest, shape = tuple(map(name_of, below)), tuple(leaf.shape)
            others = tuple(
                Parameter(place + rest, shape, variable, other)
                for place, other in shared.get(names, ())
            )
            yield Parameter(names + rest, shape, variable, owner, others)


def _owner(path: tuple[Any, ...], modules: Mapping[tuple[Any, ...], object]) -> nnx.Module:
    """Returns the innermost module around a variable that is more than a container."""
    around = [modules[path[:n]] for n in range(len(path) - 1, -1, -1) if path[:n] in modules]
    owners = [module for module in around if not isinstance(module, nnx.List | nnx.Dict)]
    return cast(nnx.Module, (owners or around)[0])


def _shared(
    modules: Mapping[tuple[Any, ...], object],
) -> dict[Path, list[tuple[Path, nnx.Module]]]:
    """Returns, for each place of a variable that several modules hold, the other places."""
    held: dict[int, list[tuple[Path, nnx.Module]]] = {}
    for path, module in modules.items():
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Param):
                place = (*map(str, path), name)
                held.setdefault(id(variable), []).append((place, _owner((*path, name), modules)))
    return {
        place: [other for other in places if other[0] != place]
        for places in held.values()
        for place, _ in places
    }


def chosen(model: nnx.Module, filters: Sequence[object]) -> list[set[Path]]:
    """Returns the paths of the variables that each nnx filter takes, the first one in turn.

    Raises:
      ValueError: if one takes none.
    """
    if not filters:
        return []
    # A filter more makes it a tuple also of one; NNX does not export their type.
    states = nnx.filter_state(nnx.state(model, nnx.Param), *filters, ...)  # type: ignore[call-overload]
    found = [{tuple(map(str, path)) for path, _ in nnx.to_flat_state(s)} for s in states[:-1]]
    for given, taken in zip(filters, found, strict=True):
        check(
            len(taken) > 0,
            "a filter must take a parameter that none before it takes",
            fix="Print nnx.state(model, nnx.Param) to see the paths.",
            filter=given,
        )
    return found


def like(params: optax.Params, lookup: Callable[[Path], T], known: Mapping[Path, object]) -> PyTree:
    """Returns a tree like ``params`` of what ``lookup`` says of each path.

    A ``None`` counts as a leaf where a parameter is known: a gradient may be absent.

    Args:
      params: parameters, gradients or a part of them.
      lookup: says what goes where.
      known: the paths of the model.

    Raises:
      ValueError: if a leaf is not a parameter of the model.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=absent)
    found = []
    for path, leaf in leaves:
        # As it is, too: in tree mode a gradient is a module, and 'value' may be one of its parts.
        whole, names = tuple(map(name_of, path)), path_names(path)
        names = whole if whole in known else names
        if names not in known and leaf is not None:
            # A bare array is what optax.inject_hyperparams calls what it takes for a schedule with.
            advice = " With optax.inject_hyperparams name the argument in static_args=('mask',)."
            raise ValueError(
                "the tree must hold parameters of the model that this was made for, "
                f"got leaf={'.'.join(names)!r}. "
                f"Known parameters: {', '.join('.'.join(path) for path in known)}."
                + ("" if names else advice)
            )
        found.append(lookup(names) if names in known else None)
    return jax.tree.unflatten(treedef, found)


def beside(tree: PyTree, params: optax.Params, rule: str, fix: str) -> list[PyTree]:
    """Returns what a tree holds at each parameter's place, ``None`` where it holds ``None``.

    Args:
      tree: like ``params``, perhaps in another form: ``nnx.State``, pure dict, nested.
      params: the parameters.
      rule: what the tree must be, for the error.
      fix: what to change.

    Raises:
      ValueError: if the two hold different paths; it names them.
    """
    if _form(tree) == _form(params):
        return jax.tree.leaves(tree)
    given, wanted = by_path(tree), by_path(params)
    missing = {path for path, leaf in wanted.items() if leaf is not None and path not in given}
    further = {p for p, leaf in given.items() if leaf is not None and wanted.get(p) is None}
    apart = sorted(".".join(path) for path in missing | further)
    check(not apart, rule, fix=fix, on_one_side_only=apart)
    return [given[path] for path, leaf in wanted.items() if leaf is not None]


def given_for(tree: PyTree, params: optax.Params) -> PyTree:
    """Returns a tree, or what a function in its place says of the parameters.

    In NNX's tree mode a tree may be a module, which can be called, too.
    """
    return tree(params) if callable(tree) and not isinstance(tree, nnx.Module) else tree


def in_form_of(old: PyTree, new: PyTree) -> PyTree:
    """Returns the leaves of ``new`` in the structure of ``old``, which holds the same paths."""
    if _form(old) == _form(new):
        return new
    found = by_path(new)
    return jax.tree.unflatten(jax.tree.structure(old), [found[path] for path in paths(old)])


def paths(tree: PyTree) -> list[Path]:
    """Returns the paths of a tree's leaves."""
    return [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def in_order(names: Sequence[Path]) -> list[int]:
    """Returns every path's place among them in order, with numbers as numbers.

    The order of a tree's leaves depends on its form: as strings, 10 comes before 2.
    """

    def key(i: int) -> list[tuple[int, str]]:
        return [(int(n), "") if n.isdecimal() else (-1, n) for n in names[i]]

    places = [0] * len(names)
    for place, i in enumerate(sorted(range(len(names)), key=key)):
        places[i] = place
    return places


def check_leaves(valid: Callable[[Array], bool], rule: str, tree: PyTree) -> None:
    """Raises a ``ValueError`` that names the leaves that are not valid, with their dtypes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    odd = {".".join(path_names(path)): str(a.dtype) for path, a in leaves if not valid(a)}
    check(not odd, rule, fix="", leaves=odd)


def check_shapes(
    rule: str, found: Sequence[Array | None], params: optax.Params, fix: str = ""
) -> None:
    """Raises a ``ValueError`` unless each array has the shape of its parameter."""
    leaves = jax.tree.leaves(params)
    pairs = [(a, p) for a, p in zip(found, leaves, strict=True) if a is not None]
    if all(a.shape == p.shape for a, p in pairs):
        return
    odd = {
        ".".join(path): (a.shape, p.shape)
        for path, a, p in zip(paths(params), found, leaves, strict=True)
        if a is not None and a.shape != p.shape
    }
    check(not odd, rule, fix=fix, shapes=odd)


def _form(tree: PyTree) -> object:
    return jax.tree.structure(tree)


def table(*rows: Sequence[object]) -> str:
    """Returns rows of cells as lines with aligned columns; paths are dotted."""
    cells = [[_cell(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(cell: object) -> str:
    path = isinstance(cell, tuple) and cell and all(isinstance(name, str) for name in cell)
    return ".".join(map(str, cell)) if path and isinstance(cell, tuple) else str(cell)
