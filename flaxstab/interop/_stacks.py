"""What PyTorch calls the modules of containers, and the single blocks of a stack."""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Shape
from flaxstab.interop._entries import Path

Names = str | tuple[str, ...]
Children = Callable[..., Mapping[Path, Names]]

CONTAINERS: dict[type[nnx.Module], Children] = {nnx.Sequential: lambda _: {("layers",): ""}}
STACKED: set[type[nnx.Module]] = set()


def register_container(module_type: type[nnx.Module], children: Children) -> None:
    """Teaches interop what PyTorch calls the modules that a container holds.

    Args:
      module_type: the container's type.
      children: from a container to the names of modules in it, by their path from there. One name
        is that module's; '' stands for none, as PyTorch has no such module. Several are those of a
        stack: every array of the module has one more axis in front, with an entry for each name.
        Modules without an entry keep their own name.

    Raises:
      ValueError: if the type is registered already.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> from flaxstab.interop import register_container, state_dict
      >>> class Twice(nnx.Module):
      ...     def __init__(self, rngs):
      ...         layer = linear.Linear(4, 4, rngs=rngs)
      ...         graph, state = nnx.split(layer)
      ...         self.both = nnx.merge(graph, jax.tree.map(lambda a: jnp.stack([a, a]), state))
      >>> register_container(Twice, lambda module: {("both",): ("0", "1")})
      >>> {k: v.shape for k, v in state_dict(Twice(nnx.Rngs(0))).items()}
      {'0.weight': (4, 4), '0.bias': (4,), '1.weight': (4, 4), '1.bias': (4,)}
    """
    name = module_type.__name__
    check(module_type not in CONTAINERS, "a container is registered once", module_type=name)
    CONTAINERS[module_type] = children


def register_stacked(module_type: type[nnx.Module]) -> None:
    """Teaches interop that a module with one axis more than its layers have is a list of modules.

    ``nnx.vmap`` builds such a module, ``nnx.scan`` runs it: at ``blocks`` it is torch's
    ``ModuleList`` of ``blocks.0``, ``blocks.1``. Of a type that is not registered, each layer
    inside is taken for a list of its own: ``blocks.linear.0``.

    Args:
      module_type: the type that ``nnx.vmap`` made several of.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> from flaxstab.interop import register_stacked, state_dict
      >>> class Block(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = linear.Linear(2, 2, bias=False, rngs=rngs)
      >>> register_stacked(Block)
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.blocks = nnx.vmap(Block)(rngs.split(3))
      >>> list(state_dict(Net(nnx.Rngs(0))))
      ['blocks.0.linear.weight', 'blocks.1.linear.weight', 'blocks.2.linear.weight']
    """
    STACKED.add(module_type)


class Address(NamedTuple):
    """What torch calls one layer, and which part of the variables it is.

    Attributes:
      name: torch's name of the layer's module; '' for the model itself.
      at: which part of the variables, by their first axes, where they hold a stack of layers.
    """

    name: str
    at: tuple[int, ...]


class Part(NamedTuple):
    """One piece of a layer's name.

    Attributes:
      depth: the number of the path's parts that it and those before it stand for.
      names: the piece, or that of each layer of a stack.
    """

    depth: int
    names: Names


def owners(modules: Mapping[Path, nnx.Module]) -> dict[Path, Mapping[Path, Names]]:
    """Returns the names that containers give to the modules in them, by the containers' paths."""
    known = {kind: _children_of(kind) for kind in {type(module) for module in modules.values()}}
    return {
        path: children(module)
        for path, module in modules.items()
        if (children := known[type(module)]) is not None
    }


def _children_of(kind: type[nnx.Module]) -> Children | None:
    return next((CONTAINERS[base] for base in kind.__mro__ if base in CONTAINERS), None)


def parts(path: Path, owners: Mapping[Path, Mapping[Path, Names]]) -> list[Part]:
    """Returns the pieces of a module's name in torch."""
    found: list[Part] = []
    depth = 0
    while depth < len(path):
        step, names = _step(owners.get(path[:depth], {}), path[depth:])
        depth += step
        found += [Part(depth, names)] if names else []
    return found


def _step(children: Mapping[Path, Names], rest: Path) -> tuple[int, Names]:
    """Returns how much of a path a name is for, and the name; '' if torch has none."""
    for length in range(1, len(rest) + 1) if children else ():
        if rest[:length] in children:
            return length, children[rest[:length]]
    return 1, str(rest[0])


def marked(path: Path, modules: Mapping[Path, nnx.Module]) -> list[int]:
    """Returns the depths of a path at which a module's type is registered as stacked."""
    return [n for n in range(len(path) + 1) if type(modules.get(path[:n])) in STACKED]


def addresses(pieces: list[Part], sizes: Shape, numbered: list[int]) -> Iterator[Address]:
    """Yields each layer of a stack, or the one layer that is none.

    Args:
      pieces: of the name, from :func:`parts`.
      sizes: the first axes of the variables, over the layers of the stack.
      numbered: the depths after which a number follows that no container gives.

    Raises:
      ValueError: if a container has more or fewer names than the variables have entries.
    """
    plain = sorted([*pieces, *(Part(n, ()) for n in numbered)], key=lambda piece: piece.depth)
    left = list(sizes)
    choices: list[list[tuple[str, int | None]]] = []
    for piece in plain:
        if isinstance(piece.names, str):
            choices.append([(piece.names, None)])
            continue
        size = left.pop(0)
        names = piece.names or tuple(map(str, range(size)))
        check(
            len(names) == size,
            "a stack must have a name for each entry of its variables' first axis",
            names=len(names),
            entries=size,
        )
        choices.append([(name, number) for number, name in enumerate(names)])
    for chosen in product(*choices):
        at = tuple(number for _, number in chosen if number is not None)
        yield Address(".".join(name for name, _ in chosen), at)


def shown(pieces: list[Part]) -> str:
    """Returns one name for a module; that of a stack has its first and last: ``layer1.1-3``."""
    return ".".join(
        piece.names if isinstance(piece.names, str) else f"{piece.names[0]}-{piece.names[-1]}"
        for piece in pieces
    )
