"""Gives every module of a model to a rule, as PyTorch's ``Module.apply`` does."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array
from flaxstab.attention import MultiHeadAttention
from flaxstab.linear._base import check_rngs

_Path = tuple[object, ...]


class Rule(Protocol):
    """Initialises one module in place, or leaves it alone, as :func:`init_layer` does."""

    def __call__(self, module: nnx.Module, *, rngs: nnx.Rngs) -> object:
        """Is called once per module; what it returns is not used."""


# PyTorch holds the weights of these parts as bare parameters of the whole; () = every part.
_BARE: dict[type[nnx.Module], tuple[str, ...]] = {
    MultiHeadAttention: ("query", "key", "value"),
    nnx.MultiHeadAttention: ("query", "key", "value"),
    nnx.LSTMCell: (),
    nnx.OptimizedLSTMCell: (),
    nnx.SimpleCell: (),
    nnx.GRUCell: (),
}


def check_model(model: nnx.Module) -> None:
    """Raises a ``ValueError`` unless it is a model: of anything else nothing would be visited."""
    check(
        isinstance(model, nnx.Module),
        "model must be an nnx.Module",
        fix="Pass the built model itself; put several into an nnx.List.",
        model_type=type(model).__name__,
    )


def init_weights(model: nnx.Module, rule: Rule, *, rngs: nnx.Rngs) -> None:
    """Gives every module of a model to a rule, in place, children before parents.

    PyTorch's ``model.apply(rule)``: every module once, a shared one under its first path. As in
    PyTorch, parts whose weights ``nn.MultiheadAttention`` and the recurrent cells hold as bare
    parameters (query, key and value; a cell's layers) are not given to the rule; the attention's
    output projection, the attention and the cell are.

    Each call gets random streams of its own, which depend on ``rngs`` and the module's path alone:
    a module draws the same weights whatever order NNX keeps attributes in, and whatever else the
    model holds.

    A rule that sets ``module.kernel[...]`` itself sees the kernels of layers that ``nnx.vmap`` or
    ``nnx.scan`` has stacked as one array, with the axis of the stack: fans computed from its shape
    are wrong. :func:`redraw` draws each layer of the stack by its own fans.

    Args:
      model: the model. It is unchanged if the rule raises.
      rule: called as ``rule(module, rngs=…)``, e.g. ``partial(init_layer, nonlin="tanh")``.
      rngs: source of the keys; the ``params`` stream is used once.

    Raises:
      ValueError: if the model is no ``nnx.Module``, or ``rngs`` has neither a ``params`` stream
        nor a default one.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import surgery
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
      >>> init_weights(model, surgery.init_layer, rngs=nnx.Rngs(1))

    Differs from:
      ``torch.nn.Module.apply``, which returns the model, and which visits a module that several
      parents hold once for each of them; here it is visited once in all.
    """
    check_model(model)
    with all_or_nothing(model):
        key = check_rngs(rngs).params()
        for path, module in _modules(model):
            rule(module, rngs=nnx.Rngs(_key_at(key, path)))


def _modules(model: nnx.Module) -> list[tuple[_Path, nnx.Module]]:
    """Returns what PyTorch's ``apply`` would visit, in NNX's order: children first, by name."""
    everything: dict[_Path, nnx.Module] = dict(nnx.iter_modules(model))
    visited: dict[int, tuple[_Path, nnx.Module]] = {}
    for path, module in everything.items():  # tree mode comes more than once by a shared module
        if not (path and _is_bare(everything.get(path[:-1]), str(path[-1]))):
            visited.setdefault(id(module), (path, module))
    return list(visited.values())


def _is_bare(owner: nnx.Module | None, name: str) -> bool:
    return any(
        isinstance(owner, kind) and (not names or name in names) for kind, names in _BARE.items()
    )


@contextmanager
def all_or_nothing(model: nnx.Module) -> Iterator[None]:
    """Puts attributes and values of a model back if the block raises."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    attributes = [(node, dict(vars(node))) for node in nodes if isinstance(node, nnx.Pytree)]
    values = [(node, _copied(node)) for node in nodes if isinstance(node, nnx.Variable)]
    try:
        yield
    except BaseException:
        for node, held in attributes:
            vars(node).clear()
            vars(node).update(held)
        for variable, value in values:
            variable.set_value(value)
        raise


def _copied(variable: nnx.Variable[Array]) -> object:
    # JAX's arrays never change; NumPy's do, under variable[...] = value.
    return jax.tree.map(
        lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, variable.get_value()
    )


def _key_at(key: Array, path: _Path) -> Array:
    """Returns the key of a path: 64 bits of a hash, so that no two paths meet by chance."""
    digest = hashlib.sha256(json.dumps([str(name) for name in path]).encode()).digest()
    for word in np.frombuffer(digest[:8], "<u4"):
        key = jax.random.fold_in(key, word)
    return key
