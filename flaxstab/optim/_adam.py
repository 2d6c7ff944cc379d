"""Adam with decoupled weight decay, in PyTorch's order of operations."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array
from flaxstab.optim._masks import path_names, unwrapped

Hyper: TypeAlias = float | Array | optax.Schedule  # a number, a traced number, or a schedule
Mask: TypeAlias = Callable[[optax.Params], optax.Params] | optax.Params


class _Decay(NamedTuple):
    """A decay rate ``beta`` as its complement and logarithm, which float32 cannot take from it."""

    beta: float | Array
    complement: float | Array
    log: float | Array


def _decay_rate(beta: float | Array) -> _Decay:
    if isinstance(beta, jax.Array):
        return _Decay(beta, 1 - beta, jnp.log(beta))
    return _Decay(beta, 1 - beta, math.log(beta) if beta > 0 else -math.inf)


class _Hypers(NamedTuple):
    """The hyper-parameters of one step, as numbers or traced scalars."""

    learning_rate: float | Array
    weight_decay: float | Array
    eps: float | Array
    first: _Decay
    second: _Decay


def adamw(
    learning_rate: Hyper = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyper = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with PyTorch's update and defaults.

    Same result as ``torch.optim.AdamW``: the parameter first shrinks by
    ``learning_rate * weight_decay``, then takes the Adam step; with ``amsgrad`` the maximum runs
    over the uncorrected second moments. Both moments keep the parameter's dtype, scalars are
    computed in float32 or wider.

    Args:
      learning_rate: step size, at least 0; a number, a traced number or a schedule of the number
        of steps taken so far.
      betas: decay rates of the two moments, in [0, 1).
      eps: added to the root of the second moment, at least 0.
      weight_decay: decoupled decay rate, at least 0; a number, a traced number or a schedule.
      amsgrad: whether to divide by the largest second moment so far.
      maximize: whether to climb.
      mask: which parameters decay: a tree of booleans like the parameters', or a function from
        parameters to one (see :func:`decay_mask`); ``None`` = all.

    Returns:
      An optax transformation. Its state is optax's ``ScaleByAdamState``, or
      ``ScaleByAmsgradState``.

    Raises:
      ValueError: if a value is out of range while it is known, or the mask is a bare boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = adamw(0.1, weight_decay=0.0)
      >>> params = {"kernel": jnp.ones(2)}
      >>> updates, state = tx.update({"kernel": jnp.array([1.0, -2.0])}, tx.init(params), params)
      >>> updates["kernel"].round(6).tolist()
      [-0.10000000149011612, 0.10000000149011612]

    Differs from:
      ``optax.adamw``: its default decay is 1e-4; its bias correction ``1 - b2**t`` cancels in
      float32 (8e-5 at b2 = 0.9999); its amsgrad takes the maximum after the correction.

    Reference:
      I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101;
      S. Reddi, S. Kale, S. Kumar, "On the Convergence of Adam and Beyond", 2019,
      arXiv:1904.09237 (amsgrad).
    """
    _check_adam(learning_rate, betas, eps, weight_decay)
    check(
        not isinstance(mask, bool | np.bool_ | np.ndarray | jax.Array),
        "mask must be a function or a tree of booleans, not a bare boolean",
        fix="Pass mask=decay_mask(model); with optax.inject_hyperparams name it in "
        "static_args=('mask',).",
        mask=mask,
    )
    make_state = _amsgrad_state if amsgrad else _adam_state

    def init(params: optax.Params) -> optax.OptState:
        _decays(mask, params)
        return make_state(jnp.zeros((), jnp.int32), params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra
        check(params is not None, "weight decay needs the parameters", params=params)
        rate, decay = (_at(hyper, state.count) for hyper in (learning_rate, weight_decay))
        hypers = _Hypers(rate, decay, eps, *(_decay_rate(beta) for beta in betas))
        count = optax.safe_increment(state.count)
        treedef = jax.tree.structure(updates)
        moments = (state.mu, state.nu, *((state.nu_max,) if amsgrad else ()))
        columns = [jax.tree.leaves(tree) for tree in (_decays(mask, params), params, *moments)]
        gradients = [-g if maximize else g for g in jax.tree.leaves(updates)]
        stepped = [_step_leaf(hypers, count, *row) for row in zip(gradients, *columns, strict=True)]
        trees = [
            jax.tree.unflatten(treedef, [row[i] for row in stepped])
            for i in range(1 + len(moments))
        ]
        return trees[0], type(state)(count, *trees[1:])

    return optax.GradientTransformationExtraArgs(init, update)


def _adam_state(count: Array, params: optax.Params) -> optax.ScaleByAdamState:
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    return optax.ScaleByAdamState(count, *zeros)


def _amsgrad_state(count: Array, params: optax.Params) -> optax.ScaleByAmsgradState:
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]
    return optax.ScaleByAmsgradState(count, *zeros)


def _step_leaf(
    hypers: _Hypers,
    count: Array,
    gradient: Array,
    decays: bool,
    param: Array,
    mu: Array,
    nu: Array,
    nu_max: Array | None = None,
) -> tuple[Array, ...]:
    """Returns one parameter's update and new moments."""
    wide = widest(param.dtype)
    rate, decay, eps = (jnp.asarray(number, wide) for number in hypers[:3])
    first, second = (_Decay(*(jnp.asarray(n, wide) for n in rates)) for rates in hypers[3:])
    g, p, m, v = (jnp.asarray(a, wide) for a in (gradient, param, mu, nu))
    m = m + first.complement * (g - m)
    v = second.beta * v + second.complement * jnp.square(g)
    # 1 - beta**t, without the cancellation (test_bias_correction_does_not_cancel).
    corrections = [-jnp.expm1(jnp.asarray(count, wide) * r.log) for r in (first, second)]
    peak = v if nu_max is None else jnp.maximum(jnp.asarray(nu_max, wide), v)
    divisor = jnp.sqrt(peak) / jnp.sqrt(corrections[1]) + eps
    update = -(rate / corrections[0]) * m / divisor
    if decays:
        update = update - rate * decay * p
    kept = (m, v) if nu_max is None else (m, v, peak)
    return (jnp.asarray(update, param.dtype), *(jnp.asarray(k, mu.dtype) for k in kept))


def _at(hyper: Hyper, count: Array) -> float | Array:
    return hyper(count) if callable(hyper) else hyper


def _decays(mask: Mask | None, params: optax.Params) -> optax.Params:
    """Returns one Python boolean per parameter, in a tree like the parameters'."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    chosen = mask(params) if callable(mask) else mask
    flags, wanted = _by_name(chosen), _by_name(params)
    apart = sorted(".".join(path) for path in flags.keys() ^ wanted.keys())
    check(
        not apart,
        "mask must have one boolean per parameter, at the parameter's place",
        fix="Pass a function such as decay_mask(model): it fits every form of the tree.",
        on_one_side_only=apart,
    )
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, [bool(flags[path]) for path in wanted])


def _by_name(tree: optax.Params) -> dict[tuple[str, ...], object]:
    """Returns a tree's leaves by path, the same for a State and a pure dict."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {unwrapped(path_names(path)): leaf for path, leaf in paths}


def _check_adam(
    learning_rate: Hyper, betas: tuple[float, float], eps: float, weight_decay: Hyper
) -> None:
    """Checks what is known: neither schedules nor traced values are."""
    rule = "learning_rate, eps and weight_decay must be finite and at least 0"
    values = (learning_rate, eps, weight_decay)
    known = [float(v) for v in values if not callable(v) and not _is_traced(v)]
    valid = all(v >= 0 and math.isfinite(v) for v in known)
    check(valid, rule, learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
    check(len(betas) == 2, "betas must be two decay rates", betas=betas)
    in_range = all(0 <= float(beta) < 1 for beta in betas if not _is_traced(beta))
    check(in_range, "betas must lie in [0, 1)", betas=betas)


def _is_traced(value: object) -> bool:
    return isinstance(value, jax.core.Tracer)
