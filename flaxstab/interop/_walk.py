"""The layers of an NNX model, each with its name in PyTorch and its rule."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array, Shape
from flaxstab.interop._entries import Entry, Layer, Leaf, Path, part
from flaxstab.interop._flattened import Flattened, channels_first, is_ambiguous
from flaxstab.interop._rules import Rule, rule_of
from flaxstab.interop._stacks import Address, Part, addresses, marked, owners, parts, shown

Variables = Mapping[str, nnx.Variable[Array]]
Readers = Mapping[str, Callable[[], np.ndarray]]


class Walked(NamedTuple):
    """A layer of an NNX model, and its variables by their path in the model.

    Attributes:
      layer: the layer's values and how they travel.
      module: the layer; of a stack of layers, all of them.
      variables: the variables by path.
      again: whether the model holds this module under an earlier name as well.
      unnamed: whether it is one of a stack that belongs to no type that interop knows.
    """

    layer: Layer
    module: nnx.Module
    variables: Mapping[Path, nnx.Variable[Array]]
    again: bool = False
    unnamed: bool = False


def walk(model: nnx.Module, flattened: Flattened | None = None) -> list[Walked]:
    """Returns every layer with a rule, under each of its names; of a stack, each layer.

    Args:
      model: the model.
      flattened: see :func:`flaxstab.interop.load_state_dict`.

    Raises:
      ValueError: if a variable of the model belongs to none of them, or the order of a norm's
        axes is neither told nor shown by their sizes.
    """
    return _ordered(_Walk(model).layers(), flattened or {})


def as_is(model: nnx.Module) -> dict[str, None]:
    """Says that PyTorch counts the axes of every norm of a model in Flax's order.

    For ``flattened=``, where a model's LayerNorms over several axes of one size are no image's.

    Args:
      model: a module built of layers that have a rule.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import norms
      >>> as_is(nnx.List([norms.LayerNorm((4, 4)), norms.LayerNorm((3, 4)), norms.LayerNorm(4)]))
      {'0': None}
    """
    found = (walked.layer for walked in _Walk(model).layers())
    return {_name(layer): None for layer in found if is_ambiguous(layer)}


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns every module of a model by the name that PyTorch would give it; '' is the model.

    Args:
      model: any module. ``nnx.Sequential`` is transparent, as ``torch.nn.Sequential`` is; a list
        of modules goes by its attribute's name. A stack of layers is one module here, and its
        name has its first and its last number: ``layer1.1-3.conv1``.
    """
    modules: dict[Path, nnx.Module] = {**dict(nnx.iter_modules(model))}
    named: dict[str, nnx.Module] = {}
    names = owners(modules)
    for path in sorted(modules, key=_sort_key):
        # A Sequential comes before its list of layers, which has no name of its own.
        named.setdefault(shown(parts(path, names)), modules[path])
    return named


def _name(layer: Layer) -> str:
    return layer.prefix.removesuffix(".")


def _ordered(found: list[Walked], flattened: Flattened) -> list[Walked]:
    """Returns layers with their features in torch's order, where it is told."""
    names = {_name(walked.layer): id(walked.module) for walked in found}
    shapes: dict[int, Shape | None] = {}
    for name, shape in flattened.items():
        fix = "They are those of flaxstab.interop.state_dict without '.weight'."
        check(name in names, "flattened must name layers as PyTorch does", fix=fix, name=name)
        old = shapes.setdefault(names[name], shape)
        rule = "flattened must give one layer one shape under all its names"
        check(old == shape, rule, name=name, shapes=(old, shape))
    done = []
    for walked in found:
        layer = walked.layer
        if id(walked.module) in shapes:
            layer = channels_first(layer, shapes[id(walked.module)])
        elif is_ambiguous(layer):
            name, shape = _name(layer), layer.values[layer.entries[0].variables[0]].shape
            raise ValueError(
                "the order of a norm's axes must be told where they have one size, "
                f"got {name!r} of {shape}. Pass flattened={{{name!r}: {shape}}} if they are an "
                f"image's, which PyTorch has channels first, or {{{name!r}: None}} if both agree."
            )
        done.append(walked._replace(layer=layer))
    return done


class _Place(NamedTuple):
    """A module with a rule: where it lies, what it holds, and the pieces of its name."""

    path: Path
    module: nnx.Module
    rule: Rule
    entries: tuple[Entry, ...]
    held: Variables
    pieces: list[Part]

    @property
    def rank_known(self) -> bool:
        return any(entry.rank is not None for entry in self.entries)

    @property
    def called(self) -> str:
        return f"{'.'.join(map(str, self.path))!r} {type(self.module).__name__}"


class _Walk:
    """One walk through a model."""

    def __init__(self, model: nnx.Module) -> None:
        self._model = model
        self._nodes = _nodes(model)
        self._first = {p: node for p, node in self._nodes.items() if isinstance(node, nnx.Module)}
        self._shared = _shared(model, self._nodes)
        self._modules = {p: m for known, m in self._first.items() for p in self._paths(known)}
        self._owners = owners(self._modules)
        self._stacked_at: set[Path] = set()

    def layers(self) -> list[Walked]:
        places = [self._place(path, rule) for path, rule in self._ruled()]
        # Those of known rank first: they show whether a type of several is stacked here.
        order = sorted(places, key=lambda place: not place.rank_known)
        found = {place.path: [*self._layers(place)] for place in order}
        self._check_carried(place for place in places)
        walked = [one for place in places for one in found[place.path]]
        stacked = any(one.layer.at for one in walked)
        return sorted(walked, key=_order) if stacked else walked

    def _ruled(self) -> Iterator[tuple[Path, Rule]]:
        """Yields the modules with a rule that are not parts of another one with a rule."""
        owner: Path | None = None
        for path in sorted(self._modules, key=_sort_key):
            module = self._modules[path]
            rule = rule_of(module)
            if rule is None or (owner is not None and path[: len(owner)] == owner):
                continue
            owner = path if rule.owns else owner
            reason = rule.refusal(module)
            if reason:
                name = ".".join(map(str, path))
                raise ValueError(f"{reason}, got {name!r} {type(module).__name__}.")
            yield path, rule

    def _place(self, path: Path, rule: Rule) -> _Place:
        module = self._modules[path]
        entries, held = _held(module, rule)
        return _Place(path, module, rule, entries, held, parts(path, self._owners))

    def _layers(self, place: _Place) -> Iterator[Walked]:
        """Yields a layer or, of a stack, each of its layers."""
        sizes, depths, unnamed = self._stack(place)
        paths = {
            name: min(self._paths((*place.path, *name.split("."))), key=_sort_key)
            for name in place.held
        }
        readers = {name: cache(_reader(variable)) for name, variable in place.held.items()}
        variables = {paths[name]: variable for name, variable in place.held.items()}
        again = place.path not in self._first
        for address in addresses(place.pieces, sizes, depths):
            layer = _layer(place, address, paths, readers)
            yield Walked(layer, place.module, variables, again, unnamed)

    def _stack(self, place: _Place) -> tuple[Shape, list[int], bool]:
        """Returns the stack that a layer's variables hold.

        That is: the sizes of their first axes, the depths of the layer's path after which a number
        follows that no container names, and whether the last of these is the layer's own.
        """
        named = tuple(len(piece.names) for piece in place.pieces if isinstance(piece.names, tuple))
        depths = marked(place.path, self._modules)
        if not place.rank_known:
            depths = [depth for depth in depths if place.path[:depth] in self._stacked_at]
            first = next(iter(place.held.values()), None)
            if first is None:
                return named, [], False
            return first.shape[: len(named) + len(depths)], depths, False
        sizes = _first_axes(place)
        more = len(sizes) - len(named)
        if more == 0:
            return sizes, [], False
        if more == len(depths):
            self._stacked_at |= {place.path[:depth] for depth in depths}
            return sizes, depths, False
        if more == 1 and not depths:
            return sizes, [len(place.path)], True
        raise ValueError(
            f"it must be known which modules are stacked, got {place.called} with {sizes} before "
            "its own axes. Call flaxstab.interop.register_stacked for each type that nnx.vmap made "
            "several of, and for no other."
        )

    def _check_carried(self, places: Iterator[_Place]) -> None:
        """Raises a ``ValueError`` unless some rule carries every variable of the model."""
        own = (((*p.path, *name.split(".")) for name in p.held) for p in places)
        carried = {path for held in own for one in held for path in self._paths(one)}
        for path, variable in _variables(self._model, self._nodes):
            if path not in carried:
                starts = (path[:n] for n in reversed(range(len(path))))
                owner = next(start for start in starts if start in self._modules)
                raise ValueError(
                    "every variable must belong to a module type with a rule that carries it, "
                    f"got {'.'.join(map(str, path))!r} {variable.shape} of "
                    f"{type(self._modules[owner]).__name__}. "
                    "Call flaxstab.interop.register for its module's type."
                )

    def _paths(self, path: Path) -> list[Path]:
        """Returns a path with every other one that leads to the same node."""
        found = [path]
        for known in found if self._shared else ():  # grows while it is walked
            for group in self._shared:
                for start in [start for start in group if known[: len(start)] == start]:
                    others = (other for other in group if other[: len(start)] != start)
                    new = [(*other, *known[len(start) :]) for other in others]
                    found += [other for other in new if other not in found]
        return found


def _nodes(model: nnx.Module) -> dict[Path, object]:
    """Returns the modules and variables of a model, and arrays that are none, by first path."""
    kinds = (nnx.Module, nnx.Variable, jax.Array, np.ndarray)
    kept: dict[type, bool] = {}  # isinstance takes its time with variables
    found: dict[Path, object] = {}
    for path, node in nnx.iter_graph(model):
        if type(node) not in kept:
            kept[type(node)] = isinstance(node, kinds)
        if kept[type(node)]:
            found[path] = node
    return found


def _shared(model: nnx.Module, nodes: Mapping[Path, object]) -> list[list[Path]]:
    """Returns groups of paths to one node, as ``nnx.find_duplicates`` does, mostly in no time."""
    known = {id(node) for node in nodes.values()}
    met = {id(model)}
    pending = [iter(vars(n).values()) for n in nodes.values() if isinstance(n, nnx.Module)]
    while pending:
        for child in pending.pop():
            if id(child) in known:
                if id(child) in met:
                    return [[*group] for group in nnx.find_duplicates(model)]
                met.add(id(child))
            elif type(child) in {list, tuple}:
                pending.append(iter(child))
            elif type(child) is dict:
                pending.append(iter(child.values()))
    # What lies in a node of another kind was not met.
    return [] if met >= known else [[*group] for group in nnx.find_duplicates(model)]


def _variables(
    model: nnx.Module, nodes: Mapping[Path, object]
) -> Iterable[tuple[Path, nnx.Variable[Array]]]:
    """Returns the variables of a model but for random streams; arrays that are none as well."""
    if any(isinstance(node, jax.Array | np.ndarray) for node in nodes.values()):
        return nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))  # static ones go
    return [
        (path, node)
        for path, node in nodes.items()
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    ]


def _held(module: nnx.Module, rule: Rule) -> tuple[tuple[Entry, ...], Variables]:
    """Returns the entries of a layer whose variables it has, and these."""
    entries: list[Entry] = []
    variables: dict[str, nnx.Variable[Array]] = {}
    for entry in rule.entries(module):
        found = {name: _variable(module, name) for name in entry.variables}
        held = {name: variable for name, variable in found.items() if variable is not None}
        if len(held) == len(found):
            entries.append(entry)
            variables |= held
    return tuple(entries), variables


def _variable(module: nnx.Module, name: str) -> nnx.Variable[Array] | None:
    """Returns a variable of a module or, by a name with dots, of one of its submodules."""
    found: object = reduce(lambda m, part: vars(m)[part], name.split("."), module)
    return found if isinstance(found, nnx.Variable) else None


def _first_axes(place: _Place) -> Shape:
    """Returns the axes that a layer's variables have before those of one layer."""
    sizes: Shape | None = None
    for entry in place.entries:
        for name in entry.variables if entry.rank is not None else ():
            shape, rank = place.held[name].shape, entry.rank or 0
            first = shape[: max(len(shape) - rank, 0)]
            if len(shape) < rank or first != (first if sizes is None else sizes):
                raise ValueError(
                    "the variables of a layer must be those of one layer, or of as many each, "
                    f"got {'.'.join(map(str, (*place.path, name)))!r} {shape} of "
                    f"{type(place.module).__name__}. Stack whole layers, by nnx.vmap."
                )
            sizes = first
    return sizes or ()


def _layer(place: _Place, address: Address, paths: Mapping[str, Path], readers: Readers) -> Layer:
    at, entries = address.at, place.entries
    if at and place.rule.reads:
        entries, _ = _held(_one_of(place, at), place.rule)

    def leaf(name: str) -> Leaf:
        variable = place.held[name]
        return Leaf(variable.shape[len(at) :], variable.dtype, lambda: part(readers[name](), at))

    values = {name: leaf(name) for name in place.held}
    prefix = f"{address.name}." if address.name else ""
    return Layer(prefix, entries, values, paths, place.rule.ignored, at)


def _reader(variable: nnx.Variable[Array]) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(variable[...])


def _one_of(place: _Place, at: tuple[int, ...]) -> nnx.Module:
    """Returns a copy of a module whose own variables are those of one in the stack."""
    one = nnx.clone(place.module)
    for name, value in vars(place.module).items():
        if isinstance(value, nnx.Variable):
            setattr(one, name, type(value)(jnp.asarray(value[...])[at]))
    return one


def _order(walked: Walked) -> tuple[tuple[bool, int, str], ...]:
    """Orders the layers of a stack as a list of blocks has them."""
    names = walked.layer.prefix.split(".")
    return _sort_key(tuple(int(name) if name.isdecimal() else name for name in names))


def _sort_key(path: Path) -> tuple[tuple[bool, int, str], ...]:
    """Orders numbers as numbers: 'blocks.2' before 'blocks.10'."""
    return tuple((isinstance(p, str), p if isinstance(p, int) else 0, str(p)) for p in path)
