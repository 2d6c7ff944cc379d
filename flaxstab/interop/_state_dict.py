"""PyTorch state_dicts in and out, by walking the model and its layer types."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._typing import Array
from flaxstab.interop._rules import RULES, Rule, Tensors
from flaxstab.interop._torch import to_numpy


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a state_dict and every variable of a model.

    Attributes:
      loaded: names of the tensors that were loaded.
      missing: names that the model has and the state_dict lacks.
      unexpected: names that the state_dict has and the model lacks.
      mismatched: names whose shapes differ, with both shapes in torch's layout.
      ignored: names of tensors that the Flax layer does without (``num_batches_tracked`` of the
        stock ``nnx.BatchNorm``).
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor found its place and every variable its tensor."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            names = getattr(self, kind)
            lines += [f"{len(names)} {kind}: {', '.join(names)}"] if names else []
        return "; ".join(lines)


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
      ValueError: if a variable belongs to a module type without a rule.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> {k: v.shape for k, v in state_dict(linear.Linear(2, 5, rngs=nnx.Rngs(0))).items()}
      {'weight': (5, 2), 'bias': (5,)}
    """
    return {
        prefix + name: array
        for prefix, module, rule in _layers(model)
        for name, array in rule.to_torch(module).items()
    }


def load_state_dict(
    model: nnx.Module,
    state_dict: Mapping[str, object],
    *,
    strict: bool = True,
    rename: Callable[[str], str] | None = None,
) -> LoadReport:
    """Loads a PyTorch state_dict into a model, in place, all or nothing.

    Args:
      model: a module built of flaxstab's or stock NNX layers and registered types.
      state_dict: arrays or CPU tensors by PyTorch's names, in PyTorch's layouts.
      strict: whether every tensor and every variable must find its counterpart. Otherwise what
        fits is loaded and the report says what did not.
      rename: from a name in ``state_dict`` to the name in this model.

    Returns:
      What was loaded and what was not.

    Raises:
      ValueError: if something does not fit under ``strict``, or a variable belongs to a module
        type without a rule. The model is then unchanged.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> print(load_state_dict(model, state_dict(model)))
      2 tensors loaded
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"state_dict must be a mapping from names to arrays, got {type(state_dict).__name__}. "
            "Pass module.state_dict()."
        )
    report, changes = _sort_out(model, _renamed(state_dict, rename))
    if strict and not report.complete:
        raise ValueError(
            f"the state_dict must fit the model, got {report}. "
            "Pass rename= for other names, or strict=False to load what fits."
        )
    for variable, value in [pair for change in changes for pair in _staged(*change)]:
        variable[...] = value
    return report


def _sort_out(
    model: nnx.Module, tensors: Mapping[str, np.ndarray]
) -> tuple[LoadReport, list[tuple[nnx.Module, Tensors]]]:
    """Says what becomes of each tensor, and which values each module would get."""
    names: dict[str, list[str]] = {"loaded": [], "missing": [], "mismatched": [], "ignored": []}
    changes: list[tuple[nnx.Module, Tensors]] = []
    known = set()
    for prefix, module, rule in _layers(model):
        names["ignored"] += [prefix + name for name in rule.ignored if prefix + name in tensors]
        fitting = {}
        for name, current in rule.to_torch(module).items():
            full = prefix + name
            known.add(full)
            if full not in tensors:
                names["missing"].append(full)
            elif tensors[full].shape != current.shape:
                shapes = f"{tensors[full].shape} for {current.shape}"
                names["mismatched"].append(f"{full} {shapes}")
            else:
                fitting[name] = tensors[full]
                names["loaded"].append(full)
        changes.append((module, rule.to_flax(module, fitting)))
    unexpected = tuple(name for name in tensors if name not in {*known, *names["ignored"]})
    found = {kind: tuple(listed) for kind, listed in names.items()}
    return LoadReport(unexpected=unexpected, **found), changes


def _staged(module: nnx.Module, values: Tensors) -> list[tuple[nnx.Variable[Array], Array]]:
    """Pairs a module's variables with their new values, in their own dtype; changes nothing."""
    pairs = []
    for name, value in values.items():
        variable = vars(module).get(name)
        if not isinstance(variable, nnx.Variable):
            raise ValueError(
                "a rule must give values for variables of the module, "
                f"got {name!r} of {type(module).__name__}."
            )
        if value.shape != variable.shape:
            raise ValueError(
                "a rule must give values of the right shape, "
                f"got {name!r} {value.shape} for {variable.shape}."
            )
        # A copy: JAX may share a NumPy array's memory, and torch changes its tensors in place
        # (test_the_model_does_not_share_memory_with_the_state_dict).
        pairs.append((variable, jnp.array(value, variable[...].dtype)))
    return pairs


def _renamed(
    state_dict: Mapping[str, object], rename: Callable[[str], str] | None
) -> dict[str, np.ndarray]:
    tensors = {}
    for name, value in state_dict.items():
        new = name if rename is None else rename(name)
        if new in tensors:
            raise ValueError(f"rename must keep names apart, got {new!r} twice.")
        tensors[new] = to_numpy(value)
    return tensors


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns every module of a model by the name that PyTorch would give it; '' is the model.

    Args:
      model: any module. ``nnx.Sequential`` is transparent, as ``torch.nn.Sequential`` is; a list
        of modules goes by its attribute's name.
    """
    return {name: module for name, (_, module) in _places(model).items()}


def _places(model: nnx.Module) -> dict[str, tuple[tuple[object, ...], nnx.Module]]:
    """Returns every module with its path in the model, by PyTorch's name."""
    by_path = dict(nnx.iter_modules(model))
    places: dict[str, tuple[tuple[object, ...], nnx.Module]] = {}
    for path in sorted(by_path, key=_sort_key):
        hidden = [isinstance(by_path.get(path[:n]), nnx.Sequential) for n in range(len(path))]
        shown = (str(part) for part, is_layers in zip(path, hidden, strict=True) if not is_layers)
        # A Sequential comes before its list of layers, which has no name of its own.
        places.setdefault(".".join(shown), (path, by_path[path]))
    return places


def _layers(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, Rule]]:
    """Yields every module with a rule, with the prefix of its tensors' names.

    Raises:
      ValueError: if a variable of the model belongs to none of them.
    """
    found, carried = [], set()
    for name, (path, module) in _places(model).items():
        rule = RULES.get(type(module))
        if rule is not None:
            found.append((f"{name}." if name else "", module, rule))
            own = rule.to_flax(module, rule.to_torch(module))
            carried |= {(*path, attribute) for attribute in own}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        if path not in carried:
            raise ValueError(
                "every variable must belong to a module type with a rule that carries it, "
                f"got {'.'.join(map(str, path))!r} {variable.shape}. "
                "Call flaxstab.interop.register for its module's type."
            )
    yield from found


def _sort_key(path: tuple[object, ...]) -> tuple[tuple[bool, int, str], ...]:
    """Orders numbers as numbers: 'blocks.2' before 'blocks.10'."""
    return tuple((isinstance(p, str), p if isinstance(p, int) else 0, str(p)) for p in path)
