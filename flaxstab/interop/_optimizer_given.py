"""What the state of PyTorch's optimizer says of each parameter, and an optax state with it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxstab import optim
from flaxstab._checks import check
from flaxstab._typing import PyTree
from flaxstab.functional._paths import Names as Path
from flaxstab.functional._paths import path_names
from flaxstab.interop._moments import Group
from flaxstab.interop._optimizer_kept import BUFFER, STEP, Kept, is_count, one_of
from flaxstab.interop._optimizer_kinds import KINDS, is_known
from flaxstab.interop._optimizer_names import States
from flaxstab.optim._paths import in_order, paths

_MOST = 2**31 - 1  # updates that an int32 counts
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq"}


class Given:
    """What torch's state says of each parameter.

    Attributes:
      count: how many updates there were.
      arrays: as of :class:`Kept`.
      steps: every parameter's own step number; ``None`` where torch keeps none.
    """

    def __init__(self, given: States, groups: list[Group], kept: Kept, count: int | None) -> None:
        self.arrays = {
            key: {path: np.zeros_like(array) for path, array in arrays.items()}
            for key, arrays in kept.arrays.items()
        }
        self.steps: dict[Path, int | None] = {}
        held = {name for group in groups for name in group.tensors}
        stray = [name for name, state in given.items() if state and name not in held]
        check(
            not stray,
            "torch's state must be of parameters that have one here",
            fix="optim.sgd keeps momentum_buffer with momentum; frozen parameters have no moments.",
            left_over=stray[:3],
            number=len(stray),
        )
        for group in groups:
            self._take(group, [given[name] for name in group.tensors], kept)
        # SGD without momentum keeps nothing, before its first step and after.
        self.count = self._count(count, fresh=bool(kept.arrays) and not any(given.values()))

    def _take(self, group: Group, states: list[Mapping[str, np.ndarray]], kept: Kept) -> None:
        keys = kept.keys(group.paths[0])
        wanted = {*keys} if keys == [BUFFER] else {*keys, STEP}
        for name, state in zip(group.tensors, states, strict=True):
            check(
                state.keys() in ({*()}, wanted),
                "torch's optimizer must be of the same kind, with the same options",
                tensor=name,
                torch=sorted(state),
                here=sorted(wanted),
            )
        number = one_of([_number(name, s) for name, s in zip(group.tensors, states, strict=True)],
                      "step numbers", group)  # fmt: skip
        others = [self.steps.setdefault(path, number) for path in group.paths]
        one_of([number, *others], "step numbers", group)  # of a stack's layers
        for key in keys:
            arrays = [self._array(key, *row) for row in zip(
                group.tensors, states, group.shapes, strict=True)]  # fmt: skip
            for path, array in zip(group.paths, group.to_flax(tuple(arrays)), strict=True):
                self.arrays[key][path][group.at] = array

    def _array(
        self, key: str, name: str, state: Mapping[str, np.ndarray], shape: tuple[int, ...]
    ) -> np.ndarray:
        array = state.get(key, np.zeros(shape, np.float32))  # before the first step
        check(
            array.shape == shape,
            f"{key} must have the tensor's shape",
            tensor=name,
            shape=array.shape,
            needed=shape,
        )
        check(
            any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer)),
            f"{key} must hold real numbers",
            tensor=name,
            dtype=str(array.dtype),
        )
        check(
            key not in _SQUARES or _are_squares(array),
            f"{key} must hold finite numbers of at least 0",
            fix="The state is damaged: take an earlier one.",
            tensor=name,
            least=array.min(initial=0).item(),
            most=array.max(initial=0).item(),
        )
        return array

    def _count(self, count: int | None, *, fresh: bool) -> int:
        """Returns how many updates there were."""
        known = [number for number in self.steps.values() if number is not None]
        most = max(known, default=0)
        if count is None:
            check(
                fresh or most > 0,
                "count must say how many updates there were: torch's SGD keeps no step number",
                fix="Pass count=, such as epochs * steps_per_epoch.",
                count=None,
            )
            return most
        is_count = isinstance(count, int | np.integer) and count >= most
        check(is_count and count <= _MOST, "count must be an integer of at least every step number",
              count=count, step=most)  # fmt: skip
        return int(count)


def _number(name: str, state: Mapping[str, np.ndarray]) -> int | None:
    """Returns a parameter's step number: 0 without a state, ``None`` if torch keeps none."""
    if not state:
        return 0
    if STEP not in state:
        return None
    step = state[STEP]
    whole = step.shape == () and step.dtype.kind in "fiu" and 0 <= step <= _MOST and step % 1 == 0
    check(
        bool(whole),
        f"step must be one whole number of at least 0 and at most {_MOST}",
        tensor=name,
        step=step.tolist(),
    )
    return int(step)


def _are_squares(array: np.ndarray) -> bool:
    return array.size == 0 or bool(array.min() >= 0 and array.max() < np.inf)  # NaN is neither


def replaced(state: PyTree, new: Given) -> PyTree:
    """Returns an optax state with what torch's state says."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_known)
    made: list[PyTree] = []
    for path, leaf in leaves:
        if is_known(leaf):
            made.append(_node(leaf, new))
        else:
            made.append(jnp.asarray(new.count, leaf.dtype) if is_count(path) else leaf)
    return jax.tree.unflatten(treedef, made)


def _node(node: PyTree, new: Given) -> PyTree:
    fields = {
        field: _tree(getattr(node, field), new.arrays[key])
        for field, key in KINDS[type(node)].items()
        if getattr(node, field) is not None
    }
    if isinstance(node, optax.TraceState):
        return node._replace(**fields)
    where = paths(next(iter(fields.values()))) if fields else []
    own = np.array([_own(new, path) for path in where], int)
    skipped = getattr(node, "skipped", None)
    if skipped is not None:
        sat_out = np.zeros(skipped.shape, int)
        sat_out[in_order(where)] = new.count - own
        fields["skipped"] = jnp.asarray(sat_out, skipped.dtype)
    else:
        late = [".".join(path) for path, n in zip(where, own, strict=True) if n != new.count]
        check(
            not late or isinstance(node, optim.SgdState),
            "every parameter must be at the same step, that of count",
            fix="Make the optimizer with flaxstab.optim and own_steps=True, or freeze what has no "
            "gradient.",
            count=new.count,
            not_there=late[:3],
            number=len(late),
        )
    return node._replace(count=jnp.asarray(new.count, node.count.dtype), **fields)


def _own(new: Given, path: Path) -> int:
    number = new.steps[path]
    return new.count if number is None else number


def _tree(old: PyTree, arrays: Mapping[Path, np.ndarray]) -> PyTree:
    """Returns arrays by path in the form, and the dtypes, of a tree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(old)
    # A copy: JAX may share a NumPy array's memory, and torch changes its tensors in place.
    made = [jnp.array(arrays[path_names(path)], leaf.dtype) for path, leaf in leaves]
    return jax.tree.unflatten(treedef, made)
