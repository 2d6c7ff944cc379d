"""Adam, with L2 in the gradient or decoupled weight decay, in PyTorch's order of operations."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike
from flaxstab.optim._core import Options, Parts, transformation
from flaxstab.optim._hypers import Hyper, check_hypers, check_number, is_traced
from flaxstab.optim._masks import Mask


class AdamState(NamedTuple):
    """State of :func:`adam` and :func:`adamw`.

    Attributes:
      count: how many updates there were; what schedules see.
      mu: first moments, PyTorch's ``exp_avg``.
      nu: second moments, ``exp_avg_sq``.
      nu_max: the largest second moments so far, ``max_exp_avg_sq``; ``None`` without ``amsgrad``.
      skipped: how many of the updates each parameter, in the order of their paths, sat out because
        its gradient was ``None``; its own step number is ``count`` less that. ``None`` without
        ``own_steps``.
    """

    count: Array  # type: ignore[assignment]  # optax's name hides a tuple's method
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates | None
    skipped: Array | None


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
    """The hyper-parameters that Adam has beside the learning rate and the decay."""

    first: _Decay
    second: _Decay
    eps: float | Array


class _Terms(NamedTuple):
    """The scalars of one step, in the dtype of the computation."""

    rate: Array  # learning rate, over the first moment's correction
    first: Array  # decay rate of the first moment
    first_complement: Array
    second: Array
    second_complement: Array
    root: Array  # of the second moment's correction
    eps: Array


def adamw(
    learning_rate: Hyper = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyper = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    *,
    mask: Mask | None = None,
    state_dtype: DTypeLike | None = None,
    own_steps: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with PyTorch's update and defaults.

    Same result as ``torch.optim.AdamW``: the parameter first shrinks by
    ``learning_rate * weight_decay``, then takes the Adam step; with ``amsgrad`` the maximum runs
    over the uncorrected second moments; with ``own_steps`` a parameter whose gradient is ``None``
    is left alone, and its own step number with it. Scalars and the step are computed in float32 or
    wider.

    Args:
      learning_rate: step size, at least 0; a number, a traced number or a schedule of the number
        of updates so far.
      betas: decay rates of the two moments, in [0, 1).
      eps: added to the root of the second moment, at least 0.
      weight_decay: decoupled decay rate, at least 0; a number, a traced number or a schedule.
      amsgrad: whether to divide by the largest second moment so far.
      maximize: whether to climb.
      mask: which parameters decay: a tree of booleans like the parameters', or a function from
        parameters to one (see :func:`decay_mask`); ``None`` = all.
      state_dtype: dtype of the moments; ``None`` = each parameter's. Pass float32 for bfloat16
        parameters: a bfloat16 second moment does not notice a decay of 0.999.
      own_steps: whether every parameter counts its own steps, so that gradients may be ``None``.

    Returns:
      An optax transformation. Its state is an :class:`AdamState`.

    Raises:
      ValueError: if a value is out of range while it is known, or the mask is a bare boolean; by
        ``init`` and ``update`` if mask, gradients or state do not fit the parameters, one of them
        is complex, or a gradient is ``None`` without ``own_steps``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = adamw(0.1, weight_decay=0.0)
      >>> params = {"kernel": jnp.ones(2)}
      >>> updates, state = tx.update({"kernel": jnp.array([1.0, -2.0])}, tx.init(params), params)
      >>> updates["kernel"].round(6).tolist()
      [-0.10000000149011612, 0.10000000149011612]

    Differs from:
      ``optax.adamw``: its default decay is 1e-4; its bias correction ``1 - b2**t`` cancels in
      float32 (8e-5 at b2 = 0.9999); its amsgrad takes the maximum after the correction; its
      ``mu_dtype`` leaves the second moment in the parameter's dtype.

    Reference:
      I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101;
      S. Reddi, S. Kale, S. Kumar, "On the Convergence of Adam and Beyond", 2019,
      arXiv:1904.09237 (amsgrad).
    """
    options = Options(learning_rate, weight_decay, mask, False, maximize, state_dtype, own_steps)
    return _adam(options, betas, eps, amsgrad)


def adam(
    learning_rate: Hyper = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Hyper = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    *,
    mask: Mask | None = None,
    state_dtype: DTypeLike | None = None,
    own_steps: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Returns Adam with PyTorch's update and defaults: weight decay is L2, in the gradient.

    Same result as ``torch.optim.Adam``: ``weight_decay`` times the parameter joins the gradient,
    so that it passes through the moments and large gradients weaken it. :func:`adamw` decays all
    weights alike.

    Args:
      learning_rate: as of :func:`adamw`.
      betas: as of :func:`adamw`.
      eps: as of :func:`adamw`.
      weight_decay: the factor of the L2 penalty ½Σθ², at least 0; a number, a traced number or a
        schedule.
      amsgrad: as of :func:`adamw`.
      maximize: whether to climb; the penalty still pulls towards 0.
      mask: as of :func:`adamw`.
      state_dtype: as of :func:`adamw`.
      own_steps: as of :func:`adamw`.

    Returns:
      An optax transformation. Its state is an :class:`AdamState`.

    Raises:
      ValueError: as :func:`adamw`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.full(2, 8.0)}
      >>> still = {"kernel": jnp.zeros(2)}
      >>> tx = adam(0.1, weight_decay=0.5)
      >>> updates, _ = tx.update(still, tx.init(params), params)
      >>> updates["kernel"].round(6).tolist()  # adamw: -0.1 * 0.5 * 8
      [-0.10000000149011612, -0.10000000149011612]

    Differs from:
      ``optax.adam``, which has no weight decay, and as :func:`adamw` from ``optax.adamw``.

    Reference:
      D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980.
    """
    options = Options(learning_rate, weight_decay, mask, True, maximize, state_dtype, own_steps)
    return _adam(options, betas, eps, amsgrad)


def _adam(
    options: Options, betas: tuple[float | Array, float | Array], eps: float, amsgrad: bool
) -> optax.GradientTransformationExtraArgs:
    check_hypers(
        learning_rate=options.learning_rate, eps=eps, weight_decay=options.weight_decay,
    )  # fmt: skip
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    check(pair, "betas must be two decay rates", betas=betas)
    for beta in betas:
        check_number("betas", beta)
    in_range = all(0 <= float(beta) < 1 for beta in betas if not is_traced(beta))
    check(in_range, "betas must lie in [0, 1)", betas=betas)
    terms = functools.partial(_terms, _Hypers(_decay_rate(betas[0]), _decay_rate(betas[1]), eps))
    step = functools.partial(_step, not isinstance(betas[0], jax.Array) and betas[0] < 0.5)
    if amsgrad:
        parts = Parts(AdamState, ("mu", "nu", "nu_max"), terms, step)
    else:
        state = functools.partial(AdamState, nu_max=None)
        parts = Parts(state, ("mu", "nu"), terms, step)
    return transformation(parts, options)


def _terms(hypers: _Hypers, rate: Array, step: Array, wide: DTypeLike) -> _Terms:
    t, rates = jnp.asarray(step, wide), (hypers.first, hypers.second)
    # 1 - beta**t, without the cancellation (test_bias_correction_does_not_cancel).
    first, second = (-jnp.expm1(t * jnp.asarray(decay.log, wide)) for decay in rates)
    m, m_rest, v, v_rest = (jnp.asarray(n, wide) for decay in rates for n in decay[:2])
    eps = jnp.asarray(hypers.eps, wide)
    return _Terms(rate / first, m, m_rest, v, v_rest, jnp.sqrt(second), eps)


def _step(
    short: bool, terms: _Terms, g: Array, m: Array, v: Array, peak: Array | None = None
) -> tuple[Array, ...]:
    """Returns the update and the new moments.

    Args:
      short: whether the first decay rate is below 1/2: PyTorch's ``lerp`` begins at the nearer end.
      terms: scalars.
      g: gradient.
      m: first moment.
      v: second moment.
      peak: the largest second moment before, with amsgrad.
    """
    m = g - terms.first * (g - m) if short else m + terms.first_complement * (g - m)
    v = terms.second * v + terms.second_complement * jnp.square(g)
    largest = v if peak is None else jnp.maximum(peak, v)
    update = -terms.rate * m / (jnp.sqrt(largest) / terms.root + terms.eps)
    return (update, m, v) if peak is None else (update, m, v, largest)
