"""Linen variables by PyTorch's names and layouts, by the types of the layers that hold them."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxstab._typing import Shape
from flaxstab.interop._entries import (
    BIAS,
    EMBEDDING,
    FLIPPED,
    KERNEL,
    MATRIX,
    MEAN,
    SCALE,
    SLOPE,
    TRANSPOSED,
    VAR,
    Entry,
    Layer,
    Leaf,
    tensors_of,
)
from flaxstab.interop._matching import Rename, sort_out
from flaxstab.interop._report import LoadReport

Path = tuple[str, ...]

_PARAMS, _STATS = "params", "batch_stats"


class _Kind(NamedTuple):
    """Where a Linen layer type keeps what.

    Attributes:
      entries: how its variables travel, by collection.
      ignored: tensors that torch's layer has and this one does without.
    """

    entries: Mapping[str, tuple[Entry, ...]]
    ignored: tuple[str, ...] = ()


class _Place(NamedTuple):
    """One layer of a Linen module: its types' names, its kind, its variables' shapes.

    ``nn.WeightNorm``, for one, shares its path with the layer inside.
    """

    types: tuple[str, ...]
    kind: _Kind | None
    shapes: Mapping[tuple[str, str], Shape]


class Places(NamedTuple):
    """The layers of a Linen module, as one call of it met them.

    Attributes:
      by_path: each module by its path, in the order of the calls.
    """

    by_path: Mapping[Path, _Place]


def _params(*entries: Entry) -> Callable[[nn.Module], _Kind]:
    kind = _Kind({_PARAMS: entries})

    def kind_of(module: nn.Module) -> _Kind:
        if isinstance(module, nn.Conv | nn.ConvTranspose) and module.mask is not None:
            raise ValueError(
                "PyTorch's convolutions have no mask, "
                f"got {'.'.join(module.path)!r} {type(module).__name__} with one."
            )
        return kind

    return kind_of


def _batch_norm(_: nn.Module) -> _Kind:
    return _Kind({_PARAMS: (SCALE, BIAS), _STATS: (MEAN, VAR)}, ("num_batches_tracked",))


def _conv_transpose(module: nn.Module) -> _Kind:
    transposed = isinstance(module, nn.ConvTranspose) and module.transpose_kernel
    return _params(TRANSPOSED if transposed else FLIPPED, BIAS)(module)


LINEN_KINDS: dict[type[nn.Module], Callable[[nn.Module], _Kind]] = {
    nn.Dense: _params(MATRIX, BIAS),
    nn.Conv: _params(KERNEL, BIAS),
    nn.ConvTranspose: _conv_transpose,
    nn.Embed: _params(EMBEDDING),
    nn.BatchNorm: _batch_norm,
    nn.LayerNorm: _params(SCALE, BIAS),
    nn.GroupNorm: _params(SCALE, BIAS),
    nn.InstanceNorm: _params(SCALE, BIAS),
    nn.RMSNorm: _params(SCALE),
    nn.PReLU: _params(SLOPE),
    nn.Dropout: _params(),
}


def linen_places(
    module: nn.Module,
    variables: Mapping[str, object],
    inputs: tuple[object, ...],
    arguments: Mapping[str, object],
    *,
    mutable: bool | Collection[str],
) -> Places:
    """Returns the layers of a Linen module, by calling it once without computing anything.

    Only a call shows which layers a Linen module consists of; the call must meet all of them.

    Args:
      module: the module, not bound.
      variables: all its variables, by collection.
      inputs: the call's arrays.
      arguments: the keyword arguments of ``module.apply``: ``rngs``, ``method`` and those of the
        module's own.
      mutable: which collections the call may change, as in ``module.apply``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> module, x = nn.Dense(5), jnp.ones((1, 2))
      >>> variables = module.init(jax.random.key(0), x)
      >>> places = linen_places(module, variables, (x,), {}, mutable=False)
      >>> {k: v.shape for k, v in linen_state_dict(places, variables).items()}
      {'weight': (5, 2), 'bias': (5,)}
    """
    places: dict[Path, _Place] = {}

    def note(
        call: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        context: nn.module.InterceptorContext,
    ) -> object:
        result = call(*args, **kwargs)
        met = context.module
        if met.scope is not None:
            places[met.path] = _merged(places.get(met.path), _place(met))
        return result

    call: Callable[..., object] = module.apply

    def meet(variables: Mapping[str, object]) -> None:
        with nn.intercept_methods(note):
            call(variables, *inputs, mutable=mutable, **arguments)

    jax.eval_shape(meet, variables)
    return Places(places)


def _place(module: nn.Module) -> _Place:
    kind_of = LINEN_KINDS.get(type(module))
    if kind_of is None:
        return _Place((type(module).__name__,), None, {})
    shapes = {
        (collection, name): jnp.shape(value)
        for collection, tree in nn.meta.unbox(module.variables).items()
        for name, value in tree.items()
    }
    return _Place((type(module).__name__,), kind_of(module), shapes)


def _merged(old: _Place | None, new: _Place) -> _Place:
    if old is None:
        return new
    types = tuple(dict.fromkeys((*old.types, *new.types)))
    return _Place(types, new.kind if old.kind is None else old.kind, {**new.shapes, **old.shapes})


def linen_state_dict(places: Places, variables: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Returns a Linen module's variables by PyTorch's names, in PyTorch's layouts.

    A layer's name is its path: ``('block', 'Dense_0')`` becomes ``block.Dense_0``.

    Args:
      places: the module's layers, from :func:`linen_places`.
      variables: a tree like the module's variables: all of them, some collections, some leaves,
        or a tree of gradients.

    Raises:
      ValueError: if a variable belongs to a module type without a rule, or to a layer under
        ``nn.scan`` or ``nn.vmap``.
    """
    return tensors_of(_layers(places, _leaves(variables)))


def load_linen_state_dict(
    places: Places,
    variables: Mapping[str, object],
    state_dict: Mapping[str, object],
    *,
    rename: Rename | None = None,
) -> tuple[Mapping[str, object], LoadReport]:
    """Returns the variables with the numbers of a PyTorch state_dict, all or nothing.

    Args:
      places: the module's layers, from :func:`linen_places`.
      variables: the module's variables; they are not changed.
      state_dict: arrays or CPU tensors by PyTorch's names, in PyTorch's layouts.
      rename: from a name in ``state_dict`` to the name in this module.

    Returns:
      A new tree like ``variables``, in its dtypes, and what was loaded.

    Raises:
      ValueError: if something does not fit, or a variable belongs to a module type without a
        rule.
    """
    leaves = _leaves(variables)
    loading = sort_out(_layers(places, leaves), state_dict, rename)
    loading.require("Pass rename= for other names.")
    # A copy: JAX may share a NumPy array's memory, and torch changes its tensors in place.
    new = [jnp.array(loading.values[path, ()]) for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(variables), new), loading.report


def _leaves(variables: Mapping[str, object]) -> dict[Path, np.ndarray]:
    """Returns the variables by path, in the order of the tree's leaves; boxes do not count."""
    found = jax.tree_util.tree_leaves_with_path(variables)
    return {
        tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)): np.asarray(leaf)
        for path, leaf in found
    }


def _layers(places: Places, leaves: Mapping[Path, np.ndarray]) -> list[Layer]:
    values: dict[Path, dict[str, Leaf]] = {path: {} for path in places.by_path}
    paths: dict[Path, dict[str, tuple[object, ...]]] = {path: {} for path in places.by_path}
    for leaf, value in leaves.items():
        _, *owner, name = leaf
        _check_known(places, leaf, value.shape)
        values[tuple(owner)][name] = Leaf(value.shape, value.dtype, partial(np.asarray, value))
        paths[tuple(owner)][name] = leaf
    layers = []
    for path, place in places.by_path.items():
        if place.kind is not None:
            entries = (e for in_one in place.kind.entries.values() for e in in_one)
            held = tuple(e for e in entries if set(e.variables) <= values[path].keys())
            prefix = ".".join((*path, ""))
            layers.append(Layer(prefix, held, values[path], paths[path], place.kind.ignored))
    return layers


def _check_known(places: Places, leaf: Path, shape: Shape) -> None:
    """Raises a ``ValueError`` unless a variable is one that its module's rule carries."""
    collection, *owner, name = leaf
    what = f"{'.'.join(leaf)!r} {shape}"
    place = places.by_path.get(tuple(owner))
    if place is None:
        raise ValueError(
            "every variable must belong to a module that the call meets, "
            f"got {what} of a module that was not called. "
            "Pass inputs and arguments that reach every layer."
        )
    types = " and ".join(place.types)
    entries = () if place.kind is None else place.kind.entries.get(collection, ())
    if not any(name in entry.variables for entry in entries):
        raise ValueError(
            "every variable must belong to a module type with a rule that carries it, "
            f"got {what} of {types}."
        )
    seen = place.shapes.get((collection, name), shape)
    if seen != shape:
        raise ValueError(
            f"a layer must hold its variables itself, got {what} where {types} sees {seen}: "
            "nn.scan or nn.vmap stacks them. Take them apart into one layer each."
        )
