"""Parameters that are treated differently: frozen, in groups, or by their depth."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import PyTree
from flaxstab.optim._masks import Mask, check_mask, flags, within
from flaxstab.optim._paths import Path, beside, chosen, given_for, like, parameters, table

_REST = "rest"
Rule = Mapping[str, object]


def freeze(tx: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformationExtraArgs:
    """Returns ``tx`` for all parameters but those that ``mask`` is true for.

    Frozen parameters neither move nor decay, have no moments and do not count in a norm that
    ``tx`` clips: what ``requires_grad_(False)`` does in PyTorch. Their gradients are not used and
    may be ``None``.

    Args:
      tx: an optimizer, or a chain of clipping and an optimizer.
      mask: a tree of booleans like the parameters', or a function from parameters to one, such as
        :func:`select`; true = frozen.

    Returns:
      An optax transformation with the state of ``tx``.

    Raises:
      ValueError: if the mask is a bare boolean or does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = freeze(optax.adamw(0.1), {"backbone": True, "head": False})
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"backbone": None, "head": jnp.ones(2)}, state, params)
      >>> updates["backbone"].tolist(), list(state[0].mu["backbone"])
      ([0.0, 0.0], [])

    Differs from:
      ``optax.masked``, which passes the gradients of what it leaves out on as updates, and
      ``optax.freeze``, under which frozen parameters keep moments.
    """
    check_mask(mask)
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(_hidden(params, params, flags(mask, params)))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        given = updates if params is None else params
        frozen = flags(mask, given)
        trained = None if params is None else _hidden(params, params, frozen)
        found, state = inner.update(_hidden(updates, given, frozen), state, trained, **extra)
        held = jax.tree.unflatten(jax.tree.structure(given), frozen)
        moved = jax.tree.map(lambda p, f, u: jnp.zeros_like(p) if f else u, given, held, found)
        return moved, state

    return optax.GradientTransformationExtraArgs(init, update)


def _hidden(tree: PyTree, params: optax.Params, frozen: Sequence[bool]) -> PyTree:
    """Returns a tree, in the form of the parameters, without what is frozen."""
    leaves = beside(tree, params, "the gradients must be at the parameters' places", "")
    shown = [optax.MaskedNode() if f else leaf for f, leaf in zip(frozen, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), shown)


class ParamGroups:
    """Groups of parameters with options of their own: PyTorch's ``param_groups``.

    Called with a tree of parameters it returns a like tree of the groups' names, as
    ``optax.partition`` takes it. Print it to see who is where.

    Attributes:
      groups: every parameter's group, by path.
      options: what each group sets, by name.
    """

    def __init__(self, groups: Mapping[Path, str], options: Mapping[str, Rule]) -> None:
        self.groups = dict(groups)
        self.options = {name: dict(given) for name, given in options.items()}

    def __call__(self, params: optax.Params) -> optax.Params:
        """Returns the groups' names in a tree like ``params``.

        Raises:
          ValueError: if a leaf is not a parameter of the model that the groups were made for.
        """
        return like(params, lambda path: self.groups[path], self.groups)

    def optimizer(
        self, make: Callable[..., optax.GradientTransformation], **defaults: object
    ) -> optax.GradientTransformationExtraArgs:
        """Returns one optimizer per group, as one transformation.

        Args:
          make: such as :func:`adamw`, or ``optax.inject_hyperparams`` of it.
          **defaults: its arguments where a group does not set them.

        Raises:
          ValueError: if a group sets what ``make`` does not take.
        """
        taken = inspect.signature(make).parameters
        for name, given in self.options.items():
            unknown = sorted(given.keys() - taken.keys())
            rule = f"group {name!r} must set arguments of the optimizer"
            check(not unknown, rule, fix=f"It takes {', '.join(taken)}.", unknown=unknown)
        made = {name: make(**{**defaults, **given}) for name, given in self.options.items()}
        return optax.partition(made, self)

    def __str__(self) -> str:
        rows = [
            (path, name, ", ".join(f"{key}={value}" for key, value in self.options[name].items()))
            for path, name in self.groups.items()
        ]
        return table(("parameter", "group", "options"), *rows)


def param_groups(model: nnx.Module, rules: Sequence[Rule]) -> ParamGroups:
    """Returns groups of a model's parameters that set options of their own.

    Same result as a list of groups for ``torch.optim``: what a group does not set, it takes from
    the optimizer's own arguments. Every parameter is in exactly one group: the first whose filter
    takes it, or else in the group ``'rest'``, which sets nothing.

    Args:
      model: the model; only its structure is read.
      rules: the groups: ``params``, an nnx filter; ``name``, if it is to have one; and arguments of
        the optimizer, such as ``learning_rate`` and ``weight_decay``: numbers or schedules.

    Returns:
      The groups: ``groups.optimizer(optim.adamw, learning_rate=1e-3)`` makes the optimizer.

    Raises:
      ValueError: if a rule has no ``params``, takes no parameter, or has another's name.

    Example:
      >>> from flax import nnx
      >>> from flaxstab.optim import adamw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> groups = param_groups(model, [{"params": nnx.PathContains("bias"), "weight_decay": 0.0}])
      >>> print(groups)
      parameter  group    options
      bias       group 0  weight_decay=0.0
      kernel     rest
      >>> tx = groups.optimizer(adamw, learning_rate=0.1)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    Differs from:
      ``torch.optim``, which raises if two groups share a parameter, and does not train one that is
      in none.
    """
    names = [str(rule.get("name", f"group {i}")) for i, rule in enumerate(rules)]
    check(
        len({*names, _REST}) == len(names) + 1,
        f"groups must have names of their own, and {_REST!r} is taken",
        names=names,
    )
    for rule in rules:
        check(
            "params" in rule,
            "a group must say whose it is",
            fix='Add "params": a filter.',
            group=rule,
        )
    taken = chosen(model, [rule["params"] for rule in rules])
    groups = {}
    for parameter in parameters(model):
        found = (n for n, paths in zip(names, taken, strict=True) if within(parameter.path, paths))
        groups[parameter.path] = next(found, _REST)
    options = {
        name: {key: value for key, value in rule.items() if key not in ("params", "name")}
        for name, rule in zip(names, rules, strict=True)
    }
    return ParamGroups(groups, {**options, _REST: {}})


def scale_updates(factors: PyTree) -> optax.GradientTransformation:
    """Returns a transformation that multiplies each parameter's update by a factor of its own.

    Behind an optimizer that is a learning rate of its own, decay included.

    Args:
      factors: a tree of numbers like the parameters', or a function from parameters to one, such as
        :func:`layer_decay`.

    Raises:
      ValueError: if the tree does not fit the updates.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(optax.sgd(1.0), scale_updates({"a": 1.0, "b": 0.5}))
      >>> gradients = {"a": jnp.ones(1), "b": jnp.ones(1)}
      >>> {name: float(u[0]) for name, u in tx.update(gradients, tx.init(gradients))[0].items()}
      {'a': -1.0, 'b': -0.5}
    """

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        found = beside(
            given_for(factors, updates),
            updates,
            "factors must have one number per parameter, at the parameter's place",
            "Pass a function such as layer_decay(model, …): it fits every form of the tree.",
        )
        leaves, treedef = jax.tree.flatten(updates)
        scaled = [u * jnp.asarray(f, u.dtype) for u, f in zip(leaves, found, strict=True)]
        return jax.tree.unflatten(treedef, scaled), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
