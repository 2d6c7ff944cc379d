"""The state of PyTorch's optimizers in and out: moments, step numbers, schedules' counts."""

from collections.abc import Mapping
from typing import cast

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flaxstab._typing import PyTree
from flaxstab.interop._flattened import Flattened
from flaxstab.interop._matching import Rename
from flaxstab.interop._moments import Moments
from flaxstab.interop._optimizer_given import Given, replaced
from flaxstab.interop._optimizer_kept import STEP, Kept, check_kind, covered, one_of
from flaxstab.interop._optimizer_names import Groups, Id, Names, names_by_id, states_by_name


def optimizer_state_dict(
    optimizer: PyTree,
    model: nnx.Module,
    *,
    param_groups: Groups,
    names: Names | None = None,
    rename: Rename | None = None,
    flattened: Flattened | None = None,
) -> dict[str, object]:
    """Returns an optimizer's state as the ``state_dict`` of its counterpart in ``torch.optim``.

    ``torch.optim.AdamW`` and ``Adam`` take that of :func:`flaxstab.optim.adamw` and ``adam`` and of
    ``optax.adamw`` and ``adam``; ``SGD`` that of ``sgd`` of either. In torch:
    ``optimizer.load_state_dict(interop.to_tensors(found))``. An optax state does not say more:
    that of ``optax.radam`` or ``nadam`` looks like Adam's and means something else, and whether a
    decay is decoupled is not in it. That both sides are of one kind is for the caller to know.

    Args:
      optimizer: an ``nnx.Optimizer`` or an optax state, also in chains, masks and groups.
      model: the model; its types say how moments are laid out.
      param_groups: those of the torch optimizer that shall take the state,
        ``optimizer.state_dict()['param_groups']``: which parameters it has, and its options, which
        are not taken from JAX's optimizer.
      names: the parameters' names in the order in which the torch optimizer got them,
        ``[n for n, _ in module.named_parameters()]``; with several groups, such a list for each.
        Pairs, ``module.named_parameters()`` itself, do as well. Not needed if it was built with
        ``module.named_parameters()``, so that it knows them.
      rename: from those names to the model's, as of :func:`load_state_dict`.
      flattened: as of :func:`load_state_dict`.

    Returns:
      A dict like torch's, with NumPy arrays. A parameter that has not had a step has no entry.

    Raises:
      ValueError: if the optimizer keeps something for which torch has no place, or its parameters
        are not those of the groups.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear, optim
      >>> model = linear.Linear(2, 5, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optim.adamw(1e-3), wrt=nnx.Param)
      >>> _ = optimizer.update(model, nnx.state(model, nnx.Param))
      >>> groups = [{"params": [0, 1], "param_names": ["weight", "bias"], "lr": 1e-3}]
      >>> found = optimizer_state_dict(optimizer, model, param_groups=groups)
      >>> {key: value.shape for key, value in found["state"][0].items()}
      {'step': (), 'exp_avg': (5, 2), 'exp_avg_sq': (5, 2)}

    Differs from:
      torch, which also keeps the scheduler's state elsewhere: set ``scheduler.last_epoch``.
    """
    by_id = names_by_id(param_groups, names, rename)
    kept = Kept(_pure(optimizer))
    check_kind(param_groups, kept)
    state: dict[Id, dict[str, np.ndarray]] = {}
    ids = {name: id_ for id_, name in by_id.items()}
    for group in covered(Moments(model, flattened).groups(by_id.values()), kept):
        number = one_of([kept.steps.get(path) for path in group.paths], "step numbers", group)
        if number == 0:
            continue
        for name in group.tensors:
            # SGD keeps no step number; the others keep it as float32.
            counted = number is not None and not kept.buffered(group)
            state[ids[name]] = {STEP: np.asarray(number, np.float32)} if counted else {}
        for key, arrays in kept.of(group).items():
            for name, tensor in zip(group.tensors, group.to_torch(arrays), strict=True):
                state[ids[name]][key] = tensor
    return {
        "state": {id_: state[id_] for id_ in by_id if id_ in state},
        "param_groups": [dict(group) for group in param_groups],
    }


def load_optimizer_state_dict(
    optimizer: PyTree,
    model: nnx.Module,
    state_dict: Mapping[str, object],
    *,
    names: Names | None = None,
    rename: Rename | None = None,
    flattened: Flattened | None = None,
    count: int | None = None,
) -> optax.OptState:
    """Loads the ``state_dict`` of a ``torch.optim`` optimizer, all or nothing.

    The counterparts are those of :func:`optimizer_state_dict`. What a schedule counts becomes the
    step number, too. Learning rate, betas, decay (decoupled or not) and other options are not
    loaded: they stay those of the optax transformation. Options that Adam, AdamW or SGD do not have
    are refused: ``RAdam`` and ``Muon`` keep state by the same names.

    Args:
      optimizer: an ``nnx.Optimizer``, which is changed in place, or an optax state, which is not;
        of the same kind, and newly made, in any chain, mask or groups.
      model: the model whose parameters it updates.
      state_dict: ``torch_optimizer.state_dict()``, or as ``torch.load(…, weights_only=True)`` read
        it; NumPy arrays do, too.
      names: as of :func:`optimizer_state_dict`.
      rename: as of :func:`load_state_dict`.
      flattened: as of :func:`load_state_dict`.
      count: how many updates there were. Adam's step numbers say it, unless no parameter was in all
        of them. SGD has none: pass it.

    Returns:
      The new optax state; an ``nnx.Optimizer`` has it already.

    Raises:
      ValueError: if something is missing, left over or does not fit. Nothing is then changed.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import linear, optim
      >>> model = linear.Linear(1, 2, bias=False, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optim.sgd(0.1, momentum=0.9), wrt=nnx.Param)
      >>> theirs = {
      ...     "state": {0: {"momentum_buffer": np.array([[3.0], [4.0]])}},
      ...     "param_groups": [{"params": [0]}],
      ... }
      >>> state = load_optimizer_state_dict(optimizer, model, theirs, names=["weight"], count=7)
      >>> int(state.count), state.trace["kernel"].tolist(), int(optimizer.step[...])
      (7, [[3.0, 4.0]], 7)

    Differs from:
      ``torch.optim.Optimizer.load_state_dict``, which matches parameters by their order alone.
    """
    old = _pure(optimizer)
    kept = Kept(old)
    given = states_by_name(state_dict, names, rename)
    check_kind(cast(Groups, state_dict["param_groups"]), kept)
    groups = covered(Moments(model, flattened).groups(given), kept)
    new = Given(given, groups, kept, count)
    state = replaced(old, new)
    if isinstance(optimizer, nnx.Optimizer):
        nnx.update(optimizer.opt_state, nnx.state(state))
        optimizer.step[...] = jnp.asarray(new.count, optimizer.step[...].dtype)
    return state


def _pure(optimizer: PyTree) -> PyTree:
    return nnx.as_pure(optimizer.opt_state if isinstance(optimizer, nnx.Optimizer) else optimizer)
