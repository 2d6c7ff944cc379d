"""The parameters of PyTorch's optimizer by name; its state_dict has numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np

from flaxstab._checks import check
from flaxstab.interop._torch import to_numpy

Names: TypeAlias = Sequence[str] | Sequence[Sequence[str]]
Groups: TypeAlias = Sequence[Mapping[str, object]]
States: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]
Id: TypeAlias = int | str

_FIX = "Pass optimizer.state_dict()."


def names_by_id(
    groups: object, names: Names | None, rename: Callable[[str], str] | None
) -> dict[Id, str]:
    """Returns the names of the parameters of torch's ``param_groups``, in their order.

    Raises:
      ValueError: if a group has no names and none are given, or they do not fit.
    """
    listed = groups if isinstance(groups, Sequence) and not isinstance(groups, str) else []
    check(
        len(listed) > 0 and all(map(_is_group, listed)),
        "param_groups must be groups with params, a list of numbers or names",
        fix="Pass optimizer.state_dict()['param_groups'].",
        param_groups=type(groups).__name__,
    )
    given = _by_group(cast(Groups, listed), names)
    found: dict[Id, str] = {}
    for i, group in enumerate(cast(Groups, listed)):
        ids, own = cast(Sequence[Id], group["params"]), given[i]
        check(
            len(own) == len(ids),
            "names must be one for each parameter of the group, in its order",
            group=i,
            names=len(own),
            parameters=len(ids),
        )
        found |= dict(zip(ids, own, strict=True))
    renamed = {id_: name if rename is None else rename(name) for id_, name in found.items()}
    total = sum(len(names) for names in given)
    check(
        len(set(renamed.values())) == total,
        "every parameter of the optimizer must have a name of its own",
        parameters=total,
        names=len(set(renamed.values())),
    )
    return renamed


def _is_group(group: object) -> bool:
    """Whether something is a group whose parameters have numbers or names."""
    params = group.get("params") if isinstance(group, Mapping) else None
    return isinstance(params, list | tuple) and all(isinstance(id_, int | str) for id_ in params)


def _listed(names: Names) -> list[str] | list[list[str]]:
    """Returns names as lists; of ``named_parameters()`` what comes first in each pair."""
    sound = isinstance(names, Iterable) and not isinstance(names, str | bytes | Mapping)
    found = [_name(entry) for entry in names] if sound else [None]
    check(
        all(isinstance(n, str) for n in found) or all(isinstance(n, list) for n in found),
        "names must be a list of strings, or such a list for each group",
        fix="Pass names=[n for n, _ in module.named_parameters()].",
        names=type(names).__name__,
    )
    return cast(list[str] | list[list[str]], found)


def _name(entry: object) -> object:
    """Returns a name, that of a pair of name and parameter, or a group's list of them."""
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry[0] if not isinstance(entry[1], str) else list(entry)
    if isinstance(entry, Iterable) and not isinstance(entry, str | bytes | Mapping):
        found = [_name(inner) for inner in entry]
        return found if all(isinstance(name, str) for name in found) else None
    return entry


def _by_group(groups: Groups, names: Names | None) -> list[Sequence[str]]:
    known = [_own_names(group) for group in groups]
    if names is None:
        check(
            all(own is not None for own in known),
            "names must say which parameters the groups hold",
            fix="Pass names=[n for n, _ in module.named_parameters()], or a list of them for each "
            "group, or build the optimizer with module.named_parameters().",
            names=names,
        )
        return [cast(Sequence[str], own) for own in known]
    names = _listed(names)
    flat = all(isinstance(name, str) for name in names)
    check(
        flat == (len(groups) == 1) or not (flat or len(groups) != len(names)),
        "names must be a list for each group: with several, their order is not the module's",
        groups=len(groups),
        names=len(names),
    )
    given = cast(list[Sequence[str]], [names] if flat else list(names))
    odd = [i for i, own in enumerate(known) if own is not None and [*own] != [*given[i]]]
    check(not odd, "names must be those that the groups hold", fix="Leave names out.", groups=odd)
    return given


def _own_names(group: Mapping[str, object]) -> Sequence[str] | None:
    """Returns what torch wrote down: names beside the numbers, or in their place."""
    ids = cast(Sequence[object], group["params"])
    if "param_names" in group:
        return cast(Sequence[str], group["param_names"])
    return cast(Sequence[str], ids) if ids and all(isinstance(i, str) for i in ids) else None


def states_by_name(
    state_dict: object, names: Names | None, rename: Callable[[str], str] | None
) -> States:
    """Returns the state of every parameter of torch's optimizer; an empty one before its first.

    Raises:
      ValueError: if it is no state_dict of an optimizer, or :func:`names_by_id` refuses.
    """
    whole: dict[object, object] = dict(state_dict) if isinstance(state_dict, Mapping) else {}
    kept = whole.get("state")
    check(
        isinstance(kept, Mapping) and "param_groups" in whole,
        "state_dict must be that of a torch.optim.Optimizer",
        fix=_FIX,
        keys=sorted(map(str, whole))[:5],
    )
    by_id = names_by_id(whole["param_groups"], names, rename)
    states = cast(Mapping[Id, Mapping[str, object]], kept)
    foreign = [id_ for id_ in states if id_ not in by_id]
    odd = [id_ for id_, state in states.items() if not isinstance(state, Mapping)]
    check(not odd, "the state of a parameter must be a mapping", fix=_FIX, of=odd[:3])
    check(not foreign, "the state must be of parameters in param_groups", fix=_FIX, of=foreign[:3])
    return {
        name: {k: to_numpy(v) for k, v in states.get(id_, {}).items() if v is not None}
        for id_, name in by_id.items()
    }
