"""What an optax state keeps of each parameter, by PyTorch's names."""

from collections.abc import Sequence

import jax
import numpy as np
import optax

from flaxstab import optim
from flaxstab._checks import check
from flaxstab._typing import PyTree
from flaxstab.functional._paths import Names as Path
from flaxstab.functional._paths import by_path, path_names
from flaxstab.interop._entries import part
from flaxstab.interop._moments import Group
from flaxstab.interop._optimizer_kinds import is_known, moments, nodes
from flaxstab.interop._optimizer_names import Groups
from flaxstab.optim._paths import in_order, paths

STEP, BUFFER = "step", "momentum_buffer"

_CARRIED = (optim.AdamState, optim.SgdState, optax.ScaleByAdamState, optax.TraceState)
# What guards and clipping have seen: torch keeps it elsewhere or not at all.
_SEEN = {"norm", "nonfinite", "notfinite_count", "last_finite", "total_notfinite"}
_OPTIONS = jax.tree_util.GetAttrKey("hyperparams")  # injected


class Kept:
    """What an optax state keeps of each parameter.

    Attributes:
      arrays: by torch's name for the kind, and the parameter's path.
      steps: every parameter's own step number; ``None`` if it is not counted.
      numbered: whether each parameter may have a number of its own.

    Raises:
      ValueError: if it keeps something for which torch has no place.
    """

    def __init__(self, state: PyTree) -> None:
        self.arrays: dict[str, dict[Path, np.ndarray]] = {}
        self.steps: dict[Path, int | None] = {}
        self.numbered: dict[Path, bool] = {}
        _check_carried(state)
        for node in nodes(state):
            for key, tree in moments(node).items():
                found = {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}
                twice = sorted(".".join(p) for p in found if p in self.arrays.get(key, {}))
                check(
                    not twice, "a parameter must have one moment of a kind", fix="", **{key: twice}
                )
                self.arrays.setdefault(key, {}).update(found)
                self.steps |= _steps(node, tree)
                self.numbered |= dict.fromkeys(found, getattr(node, "skipped", None) is not None)

    def keys(self, path: Path) -> list[str]:
        """Returns what is kept of a parameter, by torch's names."""
        return [key for key, arrays in self.arrays.items() if path in arrays]

    def of(self, group: Group) -> dict[str, tuple[np.ndarray, ...]]:
        """Returns what is kept of a group of parameters, by torch's names."""
        return {
            key: tuple(part(self.arrays[key][path], group.at) for path in group.paths)
            for key in self.keys(group.paths[0])
        }

    def like(self, path: Path) -> np.ndarray:
        """Returns something of a parameter's shape."""
        return self.arrays[self.keys(path)[0]][path]

    def buffered(self, group: Group) -> bool:
        """Whether the group's state is that of SGD."""
        return self.keys(group.paths[0]) == [BUFFER]


def _check_carried(state: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_known)
    odd = []
    for path, leaf in leaves:
        names = path_names(path)
        if is_known(leaf):
            odd += [] if isinstance(leaf, _CARRIED) else [type(leaf).__name__]
        elif not (_field(path) in {"count", *_SEEN} or _OPTIONS in path):
            odd.append(".".join(names) or type(leaf).__name__)
    check(
        not odd,
        "the optimizer's state must be one that torch.optim.Adam, AdamW or SGD has too",
        fix="optax.amsgrad keeps the largest corrected moment, torch the largest uncorrected one: "
        "use flaxstab.optim.adamw(amsgrad=True)."
        if "ScaleByAmsgradState" in odd
        else "",
        of=odd[:3],
    )


def check_kind(groups: Groups, kept: Kept) -> None:
    """Raises a ``ValueError`` if torch's options are provably not those of the state's kind.

    ``RAdam`` and ``Muon`` keep what ``Adam`` and ``SGD`` keep, by the same names.
    """
    adam, sgd = ("exp_avg" in kept.arrays, BUFFER in kept.arrays)
    if adam and sgd:
        return
    known = "amsgrad" if adam else "dampening"
    kind = "Adam or AdamW" if adam else "SGD"
    for i, group in enumerate(groups):
        check(
            known in group or not group.keys() & {"betas", "momentum"},
            f"torch's optimizer must be {kind}, whose options have {known}",
            fix="The same state means something else to another optimizer.",
            group=i,
            options=sorted(group.keys() - {"params", "param_names"}),
        )
        check(
            not adam or not group.get("amsgrad") or "max_exp_avg_sq" in kept.arrays,
            "torch's optimizer must have the same options as the one here",
            fix="Use flaxstab.optim.adamw(amsgrad=True).",
            group=i,
            amsgrad=group.get("amsgrad"),
        )


def is_count(path: Sequence[object]) -> bool:
    """Whether something is the count of a schedule or of injected hyper-parameters."""
    return _field(path) == "count"


def _field(path: Sequence[object]) -> str:
    """Returns which field of a state a path leads to; '' if it leads to a parameter's."""
    last = path[-1] if path else None
    return last.name if isinstance(last, jax.tree_util.GetAttrKey) else ""


def _steps(node: PyTree, tree: PyTree) -> dict[Path, int | None]:
    """Returns every parameter's own step number."""
    where = paths(tree)
    if isinstance(node, optax.TraceState):
        return dict.fromkeys(where)
    skipped = np.zeros(max(1, len(where)), int)
    if isinstance(node, optim.AdamState | optim.SgdState) and node.skipped is not None:
        skipped = np.asarray(node.skipped)
    own = int(node.count) - skipped
    return {path: int(own[i]) for path, i in zip(where, in_order(where), strict=True)}


def covered(groups: list[Group], kept: Kept) -> list[Group]:
    """Returns the groups of which something is kept.

    Raises:
      ValueError: if something is kept of other parameters, or of a part of a group.
    """
    found: dict[Path, int] = {}
    for group in groups:
        for path, size in zip(group.paths, group.sizes, strict=True):
            found[path] = found.get(path, 0) + size
    further = sorted(".".join(p) for p in kept.steps if found.get(p, 0) != kept.like(p).size)
    check(
        not further,
        "torch's param_groups must hold every parameter of the optimizer",
        fix="Freeze what torch does not train.",
        left_out=further[:3],
        number=len(further),
    )
    for group in groups:
        one_of([kept.keys(path) for path in group.paths], "moments", group)
    return [group for group in groups if group.paths[0] in kept.steps]


def one_of(values: list[PyTree], what: str, group: Group) -> PyTree:
    """Returns the one value that all have."""
    check(
        all(value == values[0] for value in values),
        f"what is one array on either side must have the same {what}",
        tensors=group.tensors,
        found=values,
    )
    return values[0]
