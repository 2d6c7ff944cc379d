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
from flaxstab.optim._paths import beside

Terms: TypeAlias = PyTree  # scalars that an optimizer's step takes, the same for many leaves


class Parts(NamedTuple):
    """What sets an optimizer apart.

    Attributes:
      state: makes its state of ``count``, the trees named in ``moments``, and ``skipped``.
      moments: the fields of the state that hold a tree like the parameters.
      terms: scalars of one step from the learning rate, the parameter's own step number, 1 at
        first, and the dtype they are needed in.
      step: from those, a gradient and a parameter's moments to its update and new moments.
    """

    state: Callable[..., optax.OptState]
    moments: tuple[str, ...]
    terms: Callable[[Array, Array, DTypeLike], Terms]
    step: Callable[..., tuple[Array, ...]]


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
    """

    learning_rate: Hyper
    weight_decay: Hyper
    mask: Mask | None
    coupled: bool
    maximize: bool
    state_dtype: DTypeLike | None


def transformation(parts: Parts, options: Options) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer: one expression per parameter, in float32 or wider.

    A parameter whose gradient is ``None`` is left alone, as PyTorch does: its update is 0, its
    moments stay, and its own step number stands still. The state knows of that in ``skipped``,
    which stays empty until it happens: with numbers of their own, XLA compiles the leaves of one
    shape one by one, which takes a CPU four times as long.
    """
    check_mask(options.mask)
    kept = options.state_dtype
    kept = None if kept is None else floating("state_dtype", kept)

    def init(params: optax.Params) -> optax.OptState:
        _decays(options, params)
        moments = {
            name: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=kept), params)
            for name in parts.moments
        }
        return parts.state(count=_zeros(), skipped=_zeros(0), **moments)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        given = updates if params is None else params
        decays = _decays(options, given)
        check(
            params is not None or not any(decays),
            "weight decay needs the parameters",
            params=params,
        )
        gradients = beside(updates, given, *_UNFIT)
        columns = [jax.tree.leaves(getattr(state, name)) for name in parts.moments]
        count = optax.safe_increment(state.count)
        steps, skipped = _own_steps(count, state.skipped, [g is None for g in gradients])
        scalars = _scalars_by(parts, options, state.count)
        rows = [
            _step_leaf(parts, options, scalars, *row)
            for row in zip(steps, decays, gradients, jax.tree.leaves(given), *columns, strict=True)
        ]
        treedef = jax.tree.structure(given)
        trees = [jax.tree.unflatten(treedef, column) for column in zip(*rows, strict=True)]
        trees = trees or [given] * (1 + len(columns))  # of no parameters at all
        moments = dict(zip(parts.moments, trees[1:], strict=True))
        return trees[0], parts.state(count=count, skipped=skipped, **moments)

    return optax.GradientTransformationExtraArgs(init, update)


_UNFIT = (
    "the gradients must be at the parameters' places, None for a parameter that has none",
    "Take them with respect to the parameters that the optimizer was made for.",
)


def _zeros(*shape: int) -> Array:
    return jnp.zeros(shape, jnp.int32)


def _decays(options: Options, params: optax.Params) -> list[bool]:
    """Returns which parameters decay, in their order."""
    if options.mask is None or is_zero(options.weight_decay):
        return [not is_zero(options.weight_decay)] * len(jax.tree.leaves(params))
    return flags(options.mask, params)


def _own_steps(
    count: Array, skipped: Array, absent: Sequence[bool]
) -> tuple[Sequence[Array], Array]:
    """Returns the number of the step that each leaf is at, and how many each has sat out."""
    if skipped.shape == (0,):
        if not any(absent):
            return [count] * len(absent), skipped
        skipped = _zeros(len(absent))
    own = count - skipped
    steps = [jax.lax.index_in_dim(own, i, keepdims=False) for i in range(len(absent))]
    return steps, skipped + np.array(absent, np.int32)


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
