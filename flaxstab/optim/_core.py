"""What all optimizers share: hyper-parameters, decay, dtypes, and leaves without a gradient."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxstab._checks import check
from flaxstab._dtypes import floating, widest
from flaxstab._typing import Array, DTypeLike, PyTree
from flaxstab.optim._hypers import Hyper, at, is_zero
from flaxstab.optim._masks import Mask, check_mask, flags
from flaxstab.optim._paths import (
    beside,
    check_leaves,
    check_shapes,
    in_form_of,
    in_order,
    paths,
)

Terms: TypeAlias = PyTree  # scalars that an optimizer's step takes, the same for many leaves


class Parts(NamedTuple):
    """What sets an optimizer apart.

    Attributes:
      state: makes its state of ``count``, the trees named in ``moments``, and ``skipped``.
      moments: the fields of the state that hold a tree like the parameters.
      terms: scalars of one step from the learning rate, the parameter's own step number, 1 at
        first, and the dtype they are needed in.
      step: from those, a gradient and a parameter's moments to its update and new moments.
      counts: whether ``terms`` depends on the step number.
    """

    state: Callable[..., optax.OptState]
    moments: tuple[str, ...]
    terms: Callable[[Array, Array, DTypeLike], Terms]
    step: Callable[..., tuple[Array, ...]]
    counts: bool = True


class Scalars(NamedTuple):
    """The scalars of one step in one dtype."""

    rate: Array
    decay: Array
    terms: Terms


class Options(NamedTuple):
    """What every optimizer can be told.

    Attributes:
      learning_rate: a number, a traced number or a schedule.
      weight_decay: likewise.
      mask: which parameters decay; ``None`` = all.
      coupled: whether decay joins the gradient (L2) instead of the update.
      maximize: whether to climb.
      state_dtype: of the moments; ``None`` = the parameter's.
      own_steps: whether every parameter counts the steps it sat out.
    """

    learning_rate: Hyper
    weight_decay: Hyper
    mask: Mask | None
    coupled: bool
    maximize: bool
    state_dtype: DTypeLike | None
    own_steps: bool = False


def transformation(parts: Parts, options: Options) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer: one expression per parameter, in float32 or wider.

    A parameter whose gradient is ``None`` is left alone, as PyTorch does: its update is 0, its
    moments stay, and its own step number stands still. The state knows of that in ``skipped``,
    which is there from the start or never: what grew later could not be carried by ``lax.scan``.
    Not by default: with numbers of their own, XLA compiles the leaves of one shape one by one,
    which takes a CPU several times as long.
    """
    check_mask(options.mask)
    kept = _state_dtype(options.state_dtype)

    def init(params: optax.Params) -> optax.OptState:
        _decays(options, params)
        _check_real(params)
        moments = {
            name: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=kept), params)
            for name in parts.moments
        }
        # At least one: arrays without elements cannot be saved with Orbax.
        skipped = _zeros(max(1, len(jax.tree.leaves(params)))) if options.own_steps else None
        return parts.state(count=_zeros(), skipped=skipped, **moments)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        given = updates if params is None else params
        _check_real(updates)
        decays = _decays(options, given)
        check(
            params is not None or not any(decays),
            "weight decay needs the parameters",
            params=params,
        )
        gradients = beside(updates, given, *_UNFIT)
        columns = [_moments(getattr(state, name), given) for name in parts.moments]
        check_shapes("a gradient must have its parameter's shape", gradients, given)
        count = optax.safe_increment(state.count)
        steps, skipped = _own_steps(parts, count, state.skipped, gradients, given)
        scalars = _scalars_by(parts, options, state.count)
        rows = [
            _step_leaf(parts, options, scalars, *row)
            for row in zip(steps, decays, gradients, jax.tree.leaves(given), *columns, strict=True)
        ]
        treedef = jax.tree.structure(given)
        trees = [jax.tree.unflatten(treedef, column) for column in zip(*rows, strict=True)]
        trees = trees or [given] * (1 + len(columns))  # of no parameters at all
        moments = {
            name: in_form_of(getattr(state, name), tree)
            for name, tree in zip(parts.moments, trees[1:], strict=True)
        }
        return trees[0], parts.state(count=count, skipped=skipped, **moments)

    return optax.GradientTransformationExtraArgs(init, update)


_UNFIT = (
    "the gradients must be at the parameters' places, None for a parameter that has none",
    "Take them with respect to the parameters that the optimizer was made for. nnx.Optimizer drops "
    "a bare None: make it nnx.Param(None), in the nnx.State that nnx.grad returns.",
)


_FOREIGN = (
    "the optimizer's state must be that of these parameters",
    "Make it with init(params); optim.thaw gives moments to parameters that were frozen. "
    "Where a gradient is None, pass the parameters too.",
)


def _zeros(*shape: int) -> Array:
    return jnp.zeros(shape, jnp.int32)


def _state_dtype(dtype: DTypeLike | None) -> DTypeLike | None:
    check(
        not isinstance(dtype, jax.Array),
        "state_dtype must be a dtype, not an array",
        fix="With optax.inject_hyperparams name it in static_args=('state_dtype',).",
        state_dtype=dtype,
    )
    return None if dtype is None else floating("state_dtype", dtype)


def _check_real(tree: optax.Params) -> None:
    """Raises a ``ValueError`` for a complex leaf, whose imaginary part would be lost."""
    check_leaves(
        lambda leaf: not jnp.issubdtype(leaf.dtype, jnp.complexfloating),
        "parameters and gradients must be real",
        tree,
    )


def _decays(options: Options, params: optax.Params) -> list[bool]:
    """Returns which parameters decay, in their order. A mask that does not fit is refused."""
    never = is_zero(options.weight_decay)
    if options.mask is None:
        return [not never] * len(jax.tree.leaves(params))
    return [flag and not never for flag in flags(options.mask, params)]


def _moments(tree: optax.Params, params: optax.Params) -> list[Array]:
    """Returns each parameter's moment, by path."""
    found = beside(tree, params, *_FOREIGN)
    check_shapes("a moment must have its parameter's shape", found, params, fix=_FOREIGN[1])
    return found


def _own_steps(
    parts: Parts,
    count: Array,
    skipped: Array | None,
    gradients: Sequence[Array | None],
    params: optax.Params,
) -> tuple[Sequence[Array], Array | None]:
    """Returns the number of the step that each leaf is at, and how many each has sat out."""
    absent = [g is None for g in gradients]
    if skipped is None:
        unnumbered = parts.counts and any(absent)
        check(
            not unnumbered,
            "a gradient of None needs a step number of its own for its parameter",
            fix="Make the optimizer with own_steps=True, or freeze what never has a gradient.",
            gradient_is_none=[
                ".".join(path)
                for path, g in zip(paths(params), gradients, strict=True)
                if g is None
            ],
        )
        return [count] * len(absent), None
    if not absent:
        return [], skipped
    fits = skipped.shape == (len(absent),)
    check(fits, _FOREIGN[0], fix=_FOREIGN[1], counts=skipped.shape, parameters=len(absent))
    places = in_order(paths(params))
    own = count - skipped
    steps = [jax.lax.index_in_dim(own, place, keepdims=False) for place in places]
    sat_out = np.zeros(len(absent), np.int32)
    sat_out[places] = absent
    return steps, skipped + sat_out


def _scalars_by(
    parts: Parts, options: Options, count: Array
) -> Callable[[Array, DTypeLike], Scalars]:
    """Returns what makes the scalars of a step in a dtype, once for all leaves that share them."""
    rate, decay = (at(hyper, count) for hyper in (options.learning_rate, options.weight_decay))
    made: dict[tuple[int, str], tuple[Array, Scalars]] = {}  # the step is held: its id is a key

    def scalars(step: Array, wide: DTypeLike) -> Scalars:
        key = id(step), str(wide)
        if key not in made:
            numbers = jnp.asarray(rate, wide), jnp.asarray(decay, wide)
            made[key] = step, Scalars(*numbers, parts.terms(numbers[0], step, wide))
        return made[key][1]

    return scalars


def _step_leaf(
    parts: Parts,
    options: Options,
    scalars: Callable[[Array, DTypeLike], Scalars],
    step: Array,
    decays: bool,
    gradient: Array | None,
    param: Array,
    *moments: Array,
) -> tuple[Array, ...]:
    """Returns one parameter's update and new moments."""
    if gradient is None:
        return jnp.zeros_like(param), *moments
    wide = widest(param.dtype, *(moment.dtype for moment in moments))
    rate, decay, terms = scalars(step, wide)
    g, p, *kept = (jnp.asarray(a, wide) for a in (gradient, param, *moments))
    g = -g if options.maximize else g
    if decays and options.coupled:
        g = g + decay * p
    update, *kept = parts.step(terms, g, *kept)
    if decays and not options.coupled:
        update = update - rate * decay * p
    old = zip(kept, moments, strict=True)
    return jnp.asarray(update, param.dtype), *(jnp.asarray(new, m.dtype) for new, m in old)
