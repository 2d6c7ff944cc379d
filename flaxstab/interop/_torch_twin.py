"""The Flax twin of a live PyTorch module, with its settings, mode and weights."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import DTypeLike
from flaxstab.interop._matching import Rename
from flaxstab.interop._state_dict import load_state_dict
from flaxstab.interop._torch_checks import check_dtype, check_plain, check_ties
from flaxstab.interop._torch_containers import Ordered, in_order
from flaxstab.interop._torch_functions import Applied, Place
from flaxstab.interop._torch_layers import (
    FUNCTIONS,
    KINDS,
    REASONS,
    Kind,
    Part,
    kind_dtype,
    overridden,
    own_code,
    refusal,
    type_name,
)
from flaxstab.interop._walk import named_modules

if TYPE_CHECKING:
    import torch

Layout = Literal["image"] | None
Build = Callable[["torch.nn.Module", "Converter"], nnx.Module]

_TEACH = "Call flaxstab.interop.register_twin for its type."
_OURS = {"dtype", "axis_name", "mesh", "rngs"}  # settings that PyTorch's layers do not have
_SOLID = ("Sequential", "ModuleList", "ModuleDict")


class _Taught(NamedTuple):
    build: Build
    rename: Rename | None


_TAUGHT: dict[object, _Taught] = {}


def register_twin(
    torch_type: "type[torch.nn.Module] | str", build: Build, *, rename: Rename | None = None
) -> None:
    """Teaches :func:`from_torch` a PyTorch module type with a ``forward`` of its own.

    What ``build`` returns may hold any weights. :func:`from_torch` then gives every layer that
    both sides know by one name PyTorch's settings, such as eps and stride, and dtypes, and loads
    the weights: all must fit.

    Args:
      torch_type: the type, or its full name where it should not be imported, such as
        ``'torchvision.models.resnet.ResNet'``. Types derived from it do not count.
      build: from a module of that type and a :class:`Converter` to the twin. The converter makes
        the twins of submodules, and has the caller's ``rngs`` and ``layout``.
      rename: from a name in the module's state_dict to the name in the twin.

    Raises:
      ValueError: if the type has been taught already.

    Example:
      >>> import torch
      >>> from flax import nnx
      >>> class TorchTwice(torch.nn.Module):
      ...     def __init__(self):
      ...         super().__init__()
      ...         self.layer = torch.nn.Linear(4, 4)
      ...     def forward(self, x):
      ...         return self.layer(self.layer(x))
      >>> class Twice(nnx.Module):
      ...     def __init__(self, layer):
      ...         self.layer = layer
      ...     def __call__(self, x):
      ...         return self.layer(self.layer(x))
      >>> register_twin(TorchTwice, lambda module, convert: Twice(convert(module.layer)))
      >>> type(from_torch(torch.nn.Sequential(TorchTwice(), torch.nn.ReLU())).layers[0]).__name__
      'Twice'
    """
    name = torch_type if isinstance(torch_type, str) else torch_type.__qualname__
    check(torch_type not in _TAUGHT, "a type is taught once", torch_type=name)
    _TAUGHT[torch_type] = _Taught(build, rename)


def from_torch(
    module: "torch.nn.Module", *, rngs: nnx.Rngs | None = None, layout: Layout = None
) -> nnx.Module:
    """Builds the Flax twin of a live PyTorch module.

    A state_dict holds numbers only. The module also has what decides about them: eps, momentum,
    padding and its mode, the kind of GELU, slopes, stride, dilation, groups, probabilities,
    ``padding_idx``, dtypes and, module by module, training or evaluation. All of it is carried
    over, with weights and running statistics; whatever cannot be is refused by its name.

    ``Sequential`` becomes ``nnx.Sequential``, ``ModuleList`` ``nnx.List``, ``ModuleDict``
    ``nnx.Dict``; layers of flaxstab, activations, pools and paddings have twins. Arrays are
    features-last inside; the twin moves the features where PyTorch's layers want them elsewhere,
    so that ``Flatten`` gives PyTorch's order and the next ``Linear`` keeps its weight. ``PReLU``
    with several slopes and ``Softmax2d`` are refused.

    Args:
      module: the module; it is not changed.
      rngs: source of the keys of dropout.
      layout: as in :func:`flaxstab.parity.compare`: ``'image'`` = the twin takes and returns
        features-last what PyTorch has at axis 1; ``None`` = the same arrays as PyTorch.
        Convolutions and pools want ``'image'``.

    Returns:
      The twin, whose tensors have PyTorch's names.

    Raises:
      ValueError: if a part cannot be carried over; the message says which one, why and what to do.

    Example:
      >>> import jax.numpy as jnp, torch
      >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU("tanh"),
      ...     torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 10)).eval()
      >>> twin = from_torch(net, layout="image")
      >>> twin(jnp.ones((2, 8, 8, 3))).shape
      (2, 10)

    Differs from:
      PyTorch, where ``requires_grad=False`` freezes a parameter: here the optimizer does
      (:func:`flaxstab.optim.freeze`). ``SyncBatchNorm`` becomes ``BatchNorm``, which is global
      under ``jit`` with a sharded batch.
    """
    torch = sys.modules.get("torch")  # whoever has a module has imported it
    is_module = torch is not None and isinstance(module, torch.nn.Module)
    check(is_module, "module must be a torch.nn.Module", module=type(module).__name__)
    check(layout in ("image", None), "layout must be 'image' or None", layout=layout)
    check_ties(module)
    converter = Converter(module, rngs, layout)
    twin = converter(module)
    carry_modes(twin, module)
    return twin


class _Built(NamedTuple):
    """A twin, where it wants its features, and where they are behind it."""

    module: nnx.Module
    takes: Place | None
    gives: Place | None


class Converter:
    """Makes the twins of a model's parts: ``convert(module.layer)``.

    Attributes:
      rngs: the source of keys that :func:`from_torch` was given.
      layout: its ``layout``.
    """

    def __init__(
        self, model: "torch.nn.Module", rngs: nnx.Rngs | None = None, layout: Layout = None
    ) -> None:
        self.rngs = rngs
        self.layout = layout
        self._model = model  # alive: its parts are known by their ids
        self._names = {id(m): name for name, m in reversed(list(model.named_modules()))}
        self._made: dict[tuple[int, Place | None], _Built] = {}

    def __call__(self, module: "torch.nn.Module") -> nnx.Module:
        """Returns the twin of a submodule, which takes and gives arrays as ``layout`` says."""
        known = id(module) in self._names
        rule = "convert takes submodules of the module that is converted"
        check(known, rule, module=type(module).__name__)
        place: Place = "last" if self.layout == "image" else "torch"
        return self._closed(self._part(module, place), module, place)

    def param_dtype(self, module: "torch.nn.Module") -> DTypeLike:
        """Returns the dtype of a module's parameters, the widest if there are several."""
        kinds = _dtypes(module, recurse=True)
        return max(kinds, key=lambda kind: kind.itemsize) if kinds else jnp.dtype("float32")

    def _closed(self, built: _Built, module: "torch.nn.Module", place: Place) -> nnx.Module:
        """Returns a twin that takes and gives its features in one place."""
        before = built.takes if built.takes not in (None, place) else None
        gives = built.gives or built.takes
        after = place if gives not in (None, "flat", place) else None
        if before is None and after is None:
            return built.module
        if isinstance(built.module, Applied):
            return Applied(built.module.function, before, after)
        if isinstance(built.module, nnx.Sequential | Ordered) and before is None:
            parts = dict(_in_turn(built.module))
            moves = getattr(built.module, "moves", (None,) * len(parts))
            return Ordered(parts, moves, after)
        wanted = "'image'" if built.takes == "last" else "None"
        rule = f"alone it wants layout={wanted}, got layout={self.layout!r}"
        raise ValueError(refusal(module, self._names[id(module)], rule))

    def _part(self, module: "torch.nn.Module", place: Place) -> _Built:
        container = _container(module)
        key = (id(module), place if container else None)
        if key not in self._made:
            build = self._contained if container else self._layer
            self._made[key] = build(module, place)
        return self._made[key]

    def _contained(self, module: "torch.nn.Module", place: Place) -> _Built:
        name = self._names[id(module)]
        check_plain(module, name)
        bare = [n for n, _ in module.named_parameters(recurse=False)]
        if bare:
            raise ValueError(refusal(module, name, f"it holds {bare} beside its layers", _TEACH))
        children = dict(_children(module))
        if _container(module) == "Sequential":
            return self._sequential(children, place)
        twins = {n: self._closed(self._part(c, place), c, place) for n, c in children.items()}
        is_list = _container(module) == "ModuleList"
        return _Built(nnx.List(twins.values()) if is_list else nnx.Dict(twins), None, None)

    def _sequential(self, children: "dict[str, torch.nn.Module]", start: Place) -> _Built:
        place, moves = start, list[Place | None]()
        parts: dict[str, nnx.Module] = {}
        for name, child in children.items():
            built = self._part(child, place)
            before = None if place in ("flat", built.takes) else built.takes
            moves.append(before)
            place = built.gives or before or place
            parts[name] = built.module
        return _Built(in_order(parts, moves, None), None, place)

    def _layer(self, module: "torch.nn.Module", place: Place) -> _Built:
        del place
        name = self._names[id(module)]
        check_plain(module, name)
        taught = _TAUGHT.get(type(module)) or _TAUGHT.get(_full_name(module))
        if taught is not None:
            return _Built(self._taught(module, name, taught), None, None)
        kind = self._kind(module, name)
        twin = self._bare(module, name, kind)
        _load(twin, module, name, None)
        return _Built(twin, kind.takes, kind.gives(module))

    def _kind(self, module: "torch.nn.Module", name: str) -> Kind:
        known = type_name(module)
        if not known:
            why = REASONS.get(type(module).__name__) or own_code(module)
            raise ValueError(refusal(module, name, why, _TEACH))
        return KINDS[known]

    def _bare(self, module: "torch.nn.Module", name: str, kind: Kind) -> nnx.Module:
        """Returns the twin of a layer, without its weights."""
        children = dict(_children(module))
        if kind.children:
            children.pop("activation", None)  # of a Transformer layer: it is asked for by its build
        wrong = [n for n, c in children.items() if type_name(c) != kind.children.get(n)]
        wrong += [n for n in kind.children if n not in children]
        if wrong:
            raise ValueError(refusal(module, name, f"its part {wrong[0]!r} was replaced", _TEACH))
        for child_name, child in children.items():
            check_plain(child, f"{name}.{child_name}" if name else child_name)
        kinds = _dtypes(module, recurse=True)
        if len(kinds) > 1:
            found = ", ".join(sorted(str(k) for k in kinds))
            raise ValueError(refusal(module, name, f"it must have one dtype, got {found}"))
        dtype = next(iter(kinds), jnp.dtype("float32"))
        check_dtype(module, name, dtype)
        try:
            return kind.build(Part(module, name, dtype, self.rngs, self._function))
        except ValueError as error:
            if str(error).startswith("cannot make a twin"):
                raise
            raise ValueError(refusal(module, name, str(error).rstrip("."))) from error

    def _function(self, activation: object) -> Callable[..., object]:
        """Returns the twin of a Transformer layer's activation."""
        torch = sys.modules["torch"]
        known = {getattr(torch.nn.functional, n): f for n, f in FUNCTIONS.items()}
        if activation in known:
            return known[activation]
        if isinstance(activation, torch.nn.Module) and type_name(activation):
            twin = KINDS[type_name(activation)].build(
                Part(activation, "activation", jnp.dtype("float32"), None, self._function)
            )
            if isinstance(twin, Applied):
                return twin.function
        raise ValueError(
            f"activation must be relu, gelu or a module of PyTorch's, got {activation!r:.60}. "
            "Give it as such a module."
        )

    def _taught(self, module: "torch.nn.Module", name: str, taught: _Taught) -> nnx.Module:
        for inner, child in module.named_modules():
            check_plain(child, ".".join(filter(None, (name, inner))))
        twin = taught.build(module, self)
        check(
            isinstance(twin, nnx.Module),
            "build must return an nnx.Module",
            type=type(module).__name__,
            returned=type(twin).__name__,
        )
        places = named_modules(twin)
        for inner, child in module.named_modules():
            if inner in places and type_name(child):
                full = ".".join(filter(None, (name, inner)))
                settled = self._bare(child, full, KINDS[type_name(child)])
                above = module.get_submodule(inner.rpartition(".")[0])
                if not _settle(places[inner], settled) and inner and not type_name(above):
                    raise ValueError(refusal(child, full, *_other(places[inner], settled)))
        _load(twin, module, name, taught.rename)
        return twin


def _settle(twin: nnx.Module, like: nnx.Module) -> bool:
    """Gives a layer the settings and the dtypes of another; False if it is of another type."""
    if not isinstance(twin, type(like)):
        return isinstance(like, Applied) and not like.function.options
    for name, value in vars(like).items():
        if isinstance(value, nnx.Variable):
            mine = vars(twin).get(name)
            if isinstance(mine, nnx.Variable):
                mine.set_value(jnp.asarray(mine[...], value.dtype))
        elif not (name.startswith("_") or name in _OURS or isinstance(value, nnx.Pytree)):
            setattr(twin, name, value)
    return True


def _other(twin: nnx.Module, like: nnx.Module) -> tuple[str, str]:
    """Returns the words for a layer of a taught twin that cannot have PyTorch's settings."""
    place, wanted = type(twin), type(like)
    rule = f"its settings fit {wanted.__name__}, got {place.__module__}.{place.__qualname__}"
    return rule, "Use flaxstab's layer in the twin, or another name for yours and rename."


def _load(twin: nnx.Module, module: "torch.nn.Module", name: str, rename: Rename | None) -> None:
    try:
        load_state_dict(twin, module.state_dict(), rename=rename)
    except ValueError as error:
        raise ValueError(refusal(module, name, str(error).rstrip("."))) from error


def carry_modes(twin: nnx.Module, module: "torch.nn.Module") -> None:
    """Gives every module of a twin the mode of the module of that name, or of the next above it."""
    modes = {name: m.training for name, m in module.named_modules(remove_duplicate=False)}
    for name, part in named_modules(twin).items():
        above = name
        while above not in modes:
            above = above.rpartition(".")[0]
        for switch in ("use_running_average", "deterministic"):
            if isinstance(vars(part).get(switch), bool):
                setattr(part, switch, not modes[above])


def _dtypes(module: "torch.nn.Module", *, recurse: bool) -> set[jnp.dtype]:
    tensors = [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]
    return {kind_dtype(str(t.dtype)) for t in tensors if t.is_floating_point()}


def _container(module: "torch.nn.Module") -> str:
    """Returns which container of PyTorch's a module is; '' if it has a forward of its own."""
    torch = sys.modules["torch"]
    for name in _SOLID:
        kind = getattr(torch.nn, name)
        if isinstance(module, kind) and not overridden(type(module), kind):
            return "" if type(module) in _TAUGHT or _full_name(module) in _TAUGHT else name
    return ""


def _children(module: "torch.nn.Module") -> "Iterator[tuple[str, torch.nn.Module]]":
    """Yields the submodules by name, also one that is there twice."""
    for name, child in module.named_modules(remove_duplicate=False):
        if name and "." not in name:
            yield name, child


def _in_turn(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    if isinstance(module, Ordered):
        yield from ((name, getattr(module, name)) for name in module.names)
    else:
        yield from ((str(i), layer) for i, layer in enumerate(vars(module)["layers"]))


def _full_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
