"""Gives a model the weights that PyTorch would have given it."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeAlias, TypeVar, cast

import jax
from flax import nnx

from flaxstab._checks import check
from flaxstab.torch_rng._building import telling
from flaxstab.torch_rng._generator import Generator
from flaxstab.torch_rng._layers import DRAWS, OWNERS, SILENT, WITNESSES, Draw, redrawn
from flaxstab.torch_rng._order import is_as_built, modules_of

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
        layer draws when its constructor returns. Or a model fresh from its constructor; its layers
        draw in the order in which they were assigned, which NNX keeps until the model is split,
        cloned, viewed or passed to a transformation.
      seed: as for :class:`Generator`.
      then: how the model draws again after PyTorch's defaults: a rule for all its layers, or rules
        by the type of the module whose layers draw again as soon as it is built (blocks that end
        their constructors with ``self.apply(...)``). A rule takes a layer, its tensors by PyTorch's
        names in PyTorch's layouts, and the generator; it returns the new tensors, or ``{}``.
        Layers are visited in the order in which they were assigned, as by ``Module.modules()``.

    Returns:
      The model.

    Raises:
      ValueError: if NNX has rebuilt the model, so that its order is lost; if a layer was built
        under ``jax.vmap``, ``jax.jit`` or ``nnx.scan``; or if a parameter belongs to a module type
        without a rule (:func:`register`). A given model is then unchanged.

    Example:
      The weights of ``torch.manual_seed(0); torch.nn.Linear(2, 3)``, transposed:

      >>> from flax import nnx
      >>> from flaxstab import linear, torch_rng
      >>> layer = torch_rng.seed_parameters(lambda: linear.Linear(2, 3, rngs=nnx.Rngs(0)), 0)
      >>> print(layer.kernel[...])
      [[-0.00529398 -0.58198076 -0.27234524]
       [ 0.3793229  -0.5203875   0.18961589]]

    Differs from:
      a model that is given: where PyTorch builds a layer earlier than it assigns it, or replaces
      one, the stream is another. A function that builds it draws in step there, too.
    """
    generator = Generator(seed)
    if isinstance(model, nnx.Module):
        _seed_model(model, generator, then)
        return cast("M", model)
    return _seed_while_building(model, generator, then)


def _seed_while_building(factory: Callable[[], M], generator: Generator, then: Then | None) -> M:
    drawn: set[int] = set()
    kept: list[nnx.Module] = []  # so that no address is used twice
    after = then if isinstance(then, Mapping) else {}

    def built(module: nnx.Module) -> None:
        if type(module) in DRAWS:
            _check_concrete(module)
            redrawn(module, DRAWS[type(module)], generator)
            drawn.add(id(module))
            kept.append(module)
        if type(module) in after:
            _draw_again(module, after[type(module)], generator)

    with telling(built, {*DRAWS, *after}, OWNERS):
        model = factory()
    if not isinstance(model, nnx.Module):
        raise ValueError(f"the function must return a module, got {type(model).__name__}.")
    layers = _layers(model)
    _check_covered(model, layers)
    for layer in layers:
        if type(layer) in DRAWS and id(layer) not in drawn:
            _fail("the function must build every layer and leave it as built", model, layer)
    if then is not None and not isinstance(then, Mapping):
        _draw_again(model, then, generator)
    return model


def _seed_model(model: nnx.Module, generator: Generator, then: Then | None) -> None:
    layers = _layers(model)
    _check_covered(model, layers)
    _check_untied(model, layers)
    _check_order(model, layers)
    params = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]
    values = [param[...] for param in params]
    after = then if isinstance(then, Mapping) else {}
    try:
        for module in modules_of(model):
            if any(module is layer for layer in layers) and type(module) in DRAWS:
                redrawn(module, DRAWS[type(module)], generator)
            if type(module) in after:
                _draw_again(module, after[type(module)], generator)
        if then is not None and not isinstance(then, Mapping):
            _draw_again(model, then, generator)
    except Exception:
        for param, value in zip(params, values, strict=True):
            param[...] = value
        raise


def _draw_again(model: nnx.Module, rule: Draw, generator: Generator) -> None:
    layers = _layers(model)
    _check_order(model, layers)
    for layer in layers:
        redrawn(layer, rule, generator)


def _layers(model: nnx.Module) -> list[nnx.Module]:
    """Returns the modules that PyTorch has as layers, in the order of their assignment."""
    found = [m for m in modules_of(model) if type(m) in DRAWS or type(m) in SILENT]
    owners = [m for m in found if type(m) in OWNERS]
    parts = {id(p) for owner in owners for p in modules_of(owner) if p is not owner}
    return [layer for layer in found if id(layer) not in parts]


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


def _check_covered(model: nnx.Module, layers: list[nnx.Module]) -> None:
    covered = {param for layer in layers for param in _own_params(layer)}
    left = [path for param, path in _params(model).items() if param not in covered]
    fix = "Call flaxstab.torch_rng.register for its module's type."
    check(not left, "every parameter must belong to a layer with a rule", fix=fix, left=left)


def _check_untied(model: nnx.Module, layers: list[nnx.Module]) -> None:
    held = Counter(param for layer in layers for param in _own_params(layer))
    names = _params(model)
    tied = [names[param] for param, times in held.items() if times > 1]
    check(not tied, "two layers that share a parameter draw it twice", fix=_FACTORY, shared=tied)


def _check_order(model: nnx.Module, layers: list[nnx.Module]) -> None:
    """Raises unless every module with two layers that draw has one that shows it as built."""
    drawing = {id(m) for m in layers if type(m) in DRAWS and type(m) is not nnx.PReLU}
    for module in modules_of(model):
        inside = [m for m in modules_of(module) if id(m) in drawing]
        witnesses = [m for m in inside if type(m) in WITNESSES]
        rebuilt = [m for m in witnesses if not is_as_built(m)]
        if len(inside) > 1 and (rebuilt or not witnesses):
            _fail("the layers must be in the order of their construction", model, inside[0])


def _check_concrete(layer: nnx.Module) -> None:
    values = [n.get_raw_value() for _, n in nnx.iter_graph(layer) if isinstance(n, nnx.Param)]
    check(
        not any(isinstance(value, jax.core.Tracer) for value in values),
        "layers are seeded one by one, not under jax.vmap, jax.jit or nnx.scan",
        fix="Build each layer for itself.",
        traced=type(layer).__name__,
    )


def _fail(rule: str, model: nnx.Module, layer: nnx.Module) -> NoReturn:
    path = next(path for path, node in nnx.iter_modules(model) if node is layer)
    raise ValueError(
        f"{rule}, got {'.'.join(map(str, path))!r} {type(layer).__name__} that NNX has rebuilt "
        f"(split and merge, clone, view and jit sort by name). {_FACTORY}"
    )
