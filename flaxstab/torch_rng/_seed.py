"""Gives a model the weights that PyTorch would have given it."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, NoReturn, TypeAlias, TypeVar, cast

import jax
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._checks import check
from flaxstab.surgery._walk import all_or_nothing
from flaxstab.torch_rng._building import telling
from flaxstab.torch_rng._generator import Generator
from flaxstab.torch_rng._layers import (
    DRAWS,
    OWNERS,
    SILENT,
    Draw,
    Tensors,
    draws_numbers,
    is_container,
    layer_rule,
    redrawn,
)
from flaxstab.torch_rng._order import modules_of, out_of_order

M = TypeVar("M", bound=nnx.Module)
Then: TypeAlias = Draw | Mapping[type[nnx.Module], Draw]

_FACTORY = "Pass a function that builds it: seed_parameters(lambda: Net(rngs), seed)."


def seed_parameters(model: M | Callable[[], M], seed: int, *, then: Then | None = None) -> M:
    """Gives a model, in place, the weights that PyTorch would have given it, bit for bit.

    Those of ``torch.manual_seed(seed)`` followed by building the same model of PyTorch's layers.
    Linear layers, convolutions, embeddings, attention and recurrent cells draw anew, flaxstab's
    and stock ones, in their own dtypes; norms draw nothing and stay as they are. Initializers
    that were given to the layers are not looked at.

    Args:
      model: a function that builds the model, in the order in which PyTorch's is built; each
        layer draws when its constructor returns. Or a model fresh from its constructor, in which
        each submodule was built when it was assigned: its layers draw in the order in which their
        attributes were first set, which NNX keeps until the model is split, cloned, viewed or
        passed to a transformation.
      seed: as for :class:`Generator`.
      then: how the model draws again after PyTorch's defaults: a rule for all its layers, or rules
        by the type of the module whose layers draw again as soon as it is built (blocks that end
        their constructors with ``self.apply(...)``). A rule takes a layer, its tensors by PyTorch's
        names in PyTorch's layouts, and the generator; it returns the new tensors, or ``{}``.
        Each layer is visited once, in the order of the attributes; attention is one layer.

    Returns:
      The model.

    Raises:
      ValueError: if NNX has rebuilt the model, so that its order is lost; if a layer was built
        under ``jax.vmap``, ``jax.jit`` or ``nnx.scan``; if a parameter belongs to a module type
        without a rule (:func:`register`), or PyTorch has no such layer (``nnx.GRUCell``,
        ``nnx.SpectralNorm``); or if ``then`` does not fit. A given model is then unchanged.

    Example:
      The weights of ``torch.manual_seed(0); torch.nn.Linear(2, 3)``, transposed:

      >>> from flax import nnx
      >>> from flaxstab import linear, torch_rng
      >>> layer = torch_rng.seed_parameters(lambda: linear.Linear(2, 3, rngs=nnx.Rngs(0)), 0)
      >>> print(layer.kernel[...])
      [[-0.00529398 -0.58198076 -0.27234524]
       [ 0.3793229  -0.5203875   0.18961589]]

    Differs from:
      the function a given model: where PyTorch builds a layer earlier than it assigns it, or
      replaces one, the stream is another; and what the constructor set afterwards is overwritten.
      Layers that the function copies (``nnx.clone``) draw nothing, as in PyTorch.
    """
    generator = Generator(seed)
    rules = _rules_of(then)
    if isinstance(model, nnx.Module):
        _seed_model(model, generator, rules)
        return cast("M", model)
    rule = "model must be an nnx.Module, or a function that builds one"
    check(callable(model), rule, type=type(model).__name__)
    return _seed_while_building(model, generator, rules)


def _seed_while_building(factory: Callable[[], M], generator: Generator, rules: "_Rules") -> M:
    drawn: list[nnx.Module] = []
    met: set[type[nnx.Module]] = set()

    def built(module: nnx.Module, module_type: type[nnx.Module]) -> None:
        if type(module) is module_type and module_type in DRAWS:
            _check_concrete(module)
            redrawn(module, DRAWS[module_type], generator)
            drawn.append(module)
        if module_type in rules.by_type:
            _check_same_order(module, drawn)
            _draw_again(module, rules.by_type[module_type], generator)
            met.add(module_type)

    with telling(built, {*DRAWS, *rules.by_type}, OWNERS):
        model = factory()
    rule = "the function must return a module"
    check(isinstance(model, nnx.Module), rule, type=type(model).__name__)
    layers = _layers(model)
    _check_known(model, layers)
    _check_met(rules, met)
    ids = {id(layer) for layer in drawn}
    for layer in layers:
        if type(layer) in DRAWS and id(layer) not in ids and not _is_copy(layer, drawn):
            _fail("the function must build every layer itself", model, layer, "that it has not")
    if rules.whole is not None:
        _check_same_order(model, drawn)
        _draw_again(model, rules.whole, generator)
    return model


def _check_same_order(model: nnx.Module, drawn: list[nnx.Module]) -> None:
    """Raises unless layers lie in the order in which they were built.

    Otherwise an attribute may have been set to None first: PyTorch then counts the module by the
    second time it is set, and NNX's attributes lie by the first.
    """
    layers = {id(layer): layer for layer in _layers(model)}
    built = [id(layer) for layer in drawn if id(layer) in layers]
    assigned = [place for place in layers if place in {*built}]
    for place, expected in zip(assigned, built, strict=True):
        if place != expected:
            what = "that was built later than it was assigned, or earlier"
            _fail("then= needs layers in one order", model, layers[place], what)


def _is_copy(layer: nnx.Module, drawn: list[nnx.Module]) -> bool:
    """Whether a layer has every bit of one that was drawn, as ``nnx.clone`` gives it."""
    same = [layer, *(other for other in drawn if type(other) is type(layer))]
    ours, *others = (interop.state_dict(one, flattened=interop.as_is(one)) for one in same)
    return any(
        ours.keys() == other.keys() and all(np.array_equal(ours[n], other[n]) for n in ours)
        for other in others
    )


def _seed_model(model: nnx.Module, generator: Generator, rules: "_Rules") -> None:
    _check_concrete(model)
    layers = _layers(model)
    _check_known(model, layers)
    _check_untied(model, layers)
    _check_order(model, [layer for layer in layers if draws_numbers(layer)])
    _check_met(rules, {t for m in modules_of(model) for t in type(m).__mro__})
    parts = _parts(modules_of(model))
    with all_or_nothing(model):
        for module in (m for m in modules_of(model) if id(m) not in parts):
            if type(module) in DRAWS:
                redrawn(module, DRAWS[type(module)], generator)
            for module_type in (t for t in reversed(type(module).__mro__) if t in rules.by_type):
                _draw_again(module, rules.by_type[module_type], generator)
        if rules.whole is not None:
            _draw_again(model, rules.whole, generator)


class _Rules(NamedTuple):
    """How a model draws again: as a whole, and each module of some types."""

    whole: Draw | None
    by_type: Mapping[type[nnx.Module], Draw]


def _rules_of(then: Then | None) -> _Rules:
    """Returns the rules.

    Raises:
      ValueError: if ``then`` is neither a rule nor rules by type.
    """
    rules: list[object] = [*then.values()] if isinstance(then, Mapping) else [then or _nothing]
    kinds: list[object] = [*then] if isinstance(then, Mapping) else [nnx.Module]
    check(
        bool(rules)
        and all(isinstance(kind, type) and issubclass(kind, nnx.Module) for kind in kinds)
        and not {nnx.List, nnx.Dict} & {*kinds}
        and all(callable(rule) and rule is not layer_rule for rule in rules),
        "then must be a function (layer, tensors, generator) -> tensors, or such functions by type",
        fix="For example then=torch_rng.layer_rule('relu'), or then={BasicBlock: ...}.",
        then=then,
    )
    return _Rules(None, then) if isinstance(then, Mapping) else _Rules(then, {})


def _nothing(layer: nnx.Module, tensors: Tensors, generator: Generator) -> Tensors:
    del layer, tensors, generator
    return {}


def _check_met(rules: _Rules, met: Collection[type]) -> None:
    missing = [kind.__name__ for kind in rules.by_type if kind not in met]
    check(not missing, "then must name types of modules of the model", missing=missing)


def _draw_again(model: nnx.Module, rule: Draw, generator: Generator) -> None:
    layers = _layers(model)
    _check_order(model, layers)
    for layer in layers:
        redrawn(layer, rule, generator)


def _layers(model: nnx.Module) -> list[nnx.Module]:
    """Returns the modules that PyTorch has as layers, in the order of their assignment."""
    parts = _parts(modules_of(model))
    return [m for m in modules_of(model) if _is_layer(m) and id(m) not in parts]


def _parts(modules: Iterable[nnx.Module]) -> set[int]:
    """Returns the addresses of modules that are parts of a layer."""
    owners = [m for m in modules if type(m) in OWNERS]
    return {id(p) for owner in owners for p in modules_of(owner) if p is not owner}


def _params(module: nnx.Module) -> dict[int, str]:
    """Returns the paths of a module's parameters by their addresses."""
    nodes = nnx.iter_graph(module)
    return {id(n): ".".join(map(str, p)) for p, n in nodes if isinstance(n, nnx.Param)}


def _own_params(layer: nnx.Module) -> set[int]:
    """Returns the addresses of the parameters that a layer's rule draws."""
    inner = [m for m in modules_of(layer) if not isinstance(m, nnx.List | nnx.Dict)][:-1]
    if type(layer) in OWNERS:
        inner = []
    return set(_params(layer)).difference(*map(_params, inner))


def _check_known(model: nnx.Module, layers: list[nnx.Module]) -> None:
    """Raises unless every parameter belongs to a layer with a rule, and nothing else is one."""
    parts = _parts(layers)
    others = [m for m in modules_of(model) if id(m) not in parts and not _is_layer(m)]
    strange = sorted({type(m).__name__ for m in others if _params(m) and not is_container(m)})
    fix = "Call flaxstab.interop.register and flaxstab.torch_rng.register for the type."
    rule = "every module must be a layer with a rule, or hold such layers"
    check(not strange, rule, fix=fix, types=strange)
    covered = {param for layer in layers for param in _own_params(layer)}
    left = [path for param, path in _params(model).items() if param not in covered]
    owners = sorted({type(m).__name__ for m in others if not covered.issuperset(_params(m))})
    rule = "every parameter must belong to a layer with a rule"
    check(not left, rule, fix=fix, left=left, of=owners)


def _is_layer(module: nnx.Module) -> bool:
    return type(module) in DRAWS or type(module) in SILENT


def _check_untied(model: nnx.Module, layers: list[nnx.Module]) -> None:
    held = Counter(param for layer in layers for param in _own_params(layer))
    names = _params(model)
    tied = [names[param] for param, times in held.items() if times > 1]
    check(not tied, "two layers that share a parameter draw it twice", fix=_FACTORY, shared=tied)


def _check_order(model: nnx.Module, visited: list[nnx.Module]) -> None:
    """Raises unless the order of the modules that draw can be read off the model."""
    node = out_of_order(model, visited)
    if node is not None:
        what = "that NNX has rebuilt (split and merge, clone, view and jit sort by name)"
        _fail("the layers must be in the order of their construction", model, node, what)


def _check_concrete(module: nnx.Module) -> None:
    """Raises if a module is being traced or has shapes only."""
    values = [n.get_raw_value() for _, n in nnx.iter_graph(module) if isinstance(n, nnx.Param)]
    arrays = (jax.Array, np.ndarray)
    check(
        all(isinstance(v, arrays) and not isinstance(v, jax.core.Tracer) for v in values),
        "layers are seeded one by one, not under jax.vmap, jax.jit, nnx.scan or nnx.eval_shape",
        fix="Build each layer for itself.",
        built=type(module).__name__,
    )


def _fail(rule: str, model: nnx.Module, module: object, what: str) -> NoReturn:
    path = next((p for p, node in nnx.iter_graph(model) if node is module), ())
    where = f" at {'.'.join(map(str, path))!r}" if path else ""
    raise ValueError(f"{rule}, got a {type(module).__name__}{where} {what}. {_FACTORY}")
