"""Swaps the normalisation layers of a model: each conversion returns a new model."""

from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
from flax import nnx

from flaxstab import norms
from flaxstab._checks import check, check_axis_name, check_positive
from flaxstab._typing import Array, AxisName, DTypeLike, Shape
from flaxstab.surgery._swap import swapped

_New = TypeVar("_New")
_BATCH = (norms.BatchNorm, norms.GhostBatchNorm, norms.FrozenBatchNorm, nnx.BatchNorm)


class MakeNorm(Protocol):
    """Builds what replaces a norm, as :func:`batch_to_group` returns it."""

    def __call__(self, layer: nnx.Module, /) -> nnx.Module | None:
        """Returns the layer in its place, which may be itself; ``None`` leaves it."""


def replace_norms(model: nnx.Module, make: MakeNorm) -> nnx.Module:
    """Returns a new model in which a function has replaced normalisation layers.

    Everything else is as before: the new model shares the arrays with the given one and has
    variables of its own, so that training the one leaves the other alone. Random streams go on
    from the same place in both. A layer that is held twice is replaced once and stays shared.

    Args:
      model: a model, or a norm; it stays as it is, also if ``make`` raises.
      make: called once for every norm, flaxstab's and NNX's. What it returns takes the layer's
        place; ``None`` leaves the layer. It gets the layer of the new model, so it may move
        variables into what it returns (``new.scale = layer.scale``). The layers that
        ``nnx.vmap`` or ``nnx.scan`` has stacked are one, whose arrays have the leading axes of
        the stack: so must those of its replacement.

    Returns:
      The new model; what replaces it, for a model that is a norm itself.

    Raises:
      ValueError: if the model is no ``nnx.Module``, ``make`` returns anything else, or the
        arrays that it returns for stacked layers lack the stack's axes. One that ``make`` raises
        gets the layer's path.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import blocks
      >>> block = blocks.BasicBlock(6, 6, rngs=nnx.Rngs(0))
      >>> type(replace_norms(block, batch_to_group(4)).bn1).__name__
      'GroupNorm'
    """
    return swapped(model, make)


def batch_to_group(num_groups: int = 32) -> MakeNorm:
    """Makes batch normalisation group normalisation, for :func:`replace_norms`.

    Scale, bias, eps and ``dtype`` are carried over, each absent where it was; the statistics are
    dropped. Serves :class:`~flaxstab.norms.BatchNorm`, ``GhostBatchNorm``, ``FrozenBatchNorm``,
    whose scale and bias learn again, and ``nnx.BatchNorm`` with features last; other norms stay.

    Args:
      num_groups: how many groups; where it does not divide the channels, the largest number below
        it that does. 1 normalises over ``(*space, C)``, which the documents call LN.

    Raises:
      ValueError: if ``num_groups`` is below 1; from the maker, if an ``nnx.BatchNorm`` normalises
        another axis than the last, or layers are stacked on another than the leading axes.

    Differs from:
      the layer that it replaces in what it computes: fine-tune. With stock layers ``dtype=None``
      promoted to the parameters' dtype; here it means the input's.

    Reference:
      Y. Wu, K. He, "Group Normalization", 2018, arXiv:1803.08494 (32 groups, section 3).
    """
    check_positive(num_groups=num_groups)

    def build(old: _Held) -> norms.GroupNorm:
        largest = min(num_groups, old.features)
        groups = next(n for n in range(largest, 0, -1) if old.features % n == 0)
        return norms.GroupNorm(groups, old.features, old.eps, affine=False, dtype=old.dtype)

    return _carrying(build)


def batch_to_layer() -> MakeNorm:
    """Makes batch normalisation layer normalisation over the channels, for :func:`replace_norms`.

    Each position is normalised over its channels alone, as in ConvNeXt. Carries over what
    :func:`batch_to_group` does, serves the same layers and raises the same errors.

    Reference:
      Z. Liu et al., "A ConvNet for the 2020s", 2022, arXiv:2201.03545 (section 2.6).
    """
    return _carrying(
        lambda old: norms.LayerNorm(
            old.features, old.eps, elementwise_affine=False, dtype=old.dtype
        )
    )


def _carrying(build: Callable[["_Held"], norms.GroupNorm | norms.LayerNorm]) -> MakeNorm:
    """Makes what ``build`` makes of batch normalisation, with the old layer's scale and bias."""
    learned = _Once(_learned)

    def make(layer: nnx.Module) -> nnx.Module | None:
        old = _read(layer)
        if old is None:
            return None
        new = build(old)
        new.scale, new.bias = nnx.data(learned(old.scale)), nnx.data(learned(old.bias))
        return new

    return make


def freeze_batch_norm(model: nnx.Module) -> nnx.Module:
    """Returns a new model whose batch normalisation no longer changes.

    Every :class:`~flaxstab.norms.BatchNorm`, ``GhostBatchNorm`` and ``nnx.BatchNorm`` becomes a
    :class:`~flaxstab.norms.FrozenBatchNorm` with its statistics, scale and bias (1 and 0 where
    absent): no optimizer sees them, and ``model.train()`` does not undo it. The rest is as in
    :func:`replace_norms`. Build the optimizer on the new model, also
    one that the model itself holds.

    Args:
      model: a model, or a norm; it stays as it is.

    Returns:
      The new model. What it computes is what the given one computes in evaluation.

    Raises:
      ValueError: if the model is no ``nnx.Module``, or a layer has no running statistics,
        normalises another axis than the last, or is stacked on another than the leading axes.

    Example:
      >>> from flax import nnx
      >>> from flaxstab import blocks
      >>> frozen = freeze_batch_norm(blocks.BasicBlock(4, 4, rngs=nnx.Rngs(0)))
      >>> sorted(nnx.state(frozen, nnx.Param))
      ['conv1', 'conv2']

    Differs from:
      stock ``nnx.BatchNorm`` in evaluation: its ``dtype=None`` promotes to the parameters' dtype,
      and it casts the statistics to ``dtype``.
    """
    constant = _Once(_constant)

    def make(layer: nnx.Module) -> nnx.Module | None:
        old = None if isinstance(layer, norms.FrozenBatchNorm) else _read(layer)
        if old is None:
            return None
        if old.mean is None or old.var is None:
            raise ValueError(
                "only running statistics can be frozen. Build the layer with "
                "track_running_stats=True, or leave it unfrozen: it normalises by the batch."
            )
        new = norms.FrozenBatchNorm(old.features, old.eps, dtype=old.dtype)
        mean = old.mean.get_value()
        scale, bias = constant(old.scale), constant(old.bias)
        new.scale = nnx.BatchStat(jnp.ones_like(mean)) if scale is None else scale
        new.bias = nnx.BatchStat(jnp.zeros_like(mean)) if bias is None else bias
        new.mean, new.var = old.mean, old.var
        new.use_running_average = old.use_running_average
        return new

    return swapped(model, make)


def unfreeze_batch_norm(model: nnx.Module, momentum: float | None = 0.1) -> nnx.Module:
    """Returns a new model whose frozen batch normalisation learns and follows the batches again.

    Every :class:`~flaxstab.norms.FrozenBatchNorm` becomes a :class:`~flaxstab.norms.BatchNorm`
    with its statistics, scale and bias, in the mode of the last ``train()`` or ``eval()``. In
    evaluation it computes, to the bit, what it did. The rest is as in :func:`replace_norms`.

    A frozen layer does not remember its ``momentum``, ``count`` (0 again, so that ``None``
    averages over the batches from here on), ``axis_name``, virtual batch size, or that it had no
    scale or bias: it has both now.

    Args:
      model: a model, or a norm; it stays as it is.
      momentum: weight of the new value in the running statistics, as of ``BatchNorm``.

    Raises:
      ValueError: if the model is no ``nnx.Module``, ``momentum`` is out of range, or layers are
        stacked on another than the leading axes.
    """
    learned = _Once(_learned)

    def make(layer: nnx.Module) -> nnx.Module | None:
        old = _read(layer) if isinstance(layer, norms.FrozenBatchNorm) else None
        if old is None:
            return None
        new = norms.BatchNorm(old.features, old.eps, momentum, dtype=old.dtype)
        new.scale, new.bias = nnx.data(learned(old.scale)), nnx.data(learned(old.bias))
        new.mean, new.var = nnx.data(old.mean), nnx.data(old.var)
        new.count = nnx.data(nnx.BatchStat(jnp.zeros(old.stack, jnp.int32)))
        new.use_running_average = old.use_running_average
        return new

    return swapped(model, make)


def convert_sync_batch_norm(model: nnx.Module, axis_name: AxisName | None) -> nnx.Module:
    """Returns a new model whose batch normalisation is synchronised over mapped axes.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: every :class:`~flaxstab.norms.BatchNorm`
    gets ``axis_name``; mode and statistics stay, see :func:`replace_norms`. Virtual batches
    (``GhostBatchNorm``) and frozen layers have nothing to synchronise and stay as they are.

    ``nnx.BatchNorm`` is not converted: flaxstab's follows another running variance (unbiased) and
    weighs devices by their counts, so that the model would train otherwise. One that has this
    ``axis_name`` already stays; another is refused.

    Args:
      model: a model, or a norm; it stays as it is.
      axis_name: mapped axes of ``vmap`` or ``shard_map`` over which the batch is spread; ``None``
        makes statistics local again. Under plain ``jit`` on a sharded batch they are global
        without any.

    Raises:
      ValueError: if the model is no ``nnx.Module``, ``axis_name`` no name, or an ``nnx.BatchNorm``
        has another ``axis_name``.
    """
    check_axis_name(axis_name)

    def make(layer: nnx.Module) -> nnx.Module | None:
        if isinstance(layer, norms.BatchNorm):
            layer.axis_name = axis_name
        elif isinstance(layer, nnx.BatchNorm):
            check(
                layer.axis_name == axis_name,
                "only flaxstab's BatchNorm can be converted",
                fix="Build the model with flaxstab.norms.BatchNorm, or pass axis_name to NNX's.",
                axis_name=layer.axis_name,
            )
        return None

    return swapped(model, make)


class _Held(NamedTuple):
    """What layers of batch normalisation have in common, whatever they call it."""

    features: int
    eps: float
    dtype: DTypeLike | None
    scale: nnx.Variable[Array] | None
    bias: nnx.Variable[Array] | None
    mean: nnx.BatchStat[Array] | None
    var: nnx.BatchStat[Array] | None
    use_running_average: bool

    @property
    def stack(self) -> Shape:
        """The leading axes that ``nnx.vmap`` or ``nnx.scan`` has given the statistics."""
        return () if self.mean is None else self.mean.get_value().shape[:-1]


def _read(layer: nnx.Module) -> _Held | None:
    """Returns what a layer of batch normalisation holds; ``None`` for another."""
    if not isinstance(layer, _BATCH):
        return None
    if isinstance(layer, nnx.BatchNorm):
        check(layer.axis == -1, "features must come last", axis=layer.axis)
        eps = layer.epsilon
    else:
        eps = layer.eps
    variables = (layer.scale, layer.bias, layer.mean, layer.var)
    for shape in (variable.get_value().shape for variable in variables if variable is not None):
        check(
            shape[-1:] == (layer.num_features,),
            "stacked layers must have the stack's axes in front",
            num_features=layer.num_features,
            shape=shape,
        )
    mode = bool(layer.use_running_average)
    return _Held(layer.num_features, eps, layer.dtype, *variables, mode)


def _learned(variable: nnx.Variable[Array]) -> nnx.Param[Array]:
    """Returns a variable as a parameter: itself if it is one."""
    if isinstance(variable, nnx.Param):
        return variable
    return nnx.Param(variable.get_value(), **variable.get_metadata())


def _constant(variable: nnx.Variable[Array]) -> nnx.BatchStat[Array]:
    """Returns a variable as a statistic with the same array and metadata."""
    return nnx.BatchStat(variable.get_value(), **variable.get_metadata())


class _Once(Generic[_New]):
    """Converts every variable once, so that layers that share one go on sharing it."""

    def __init__(self, convert: Callable[[nnx.Variable[Array]], _New]) -> None:
        self.convert = convert
        # With the variables themselves: the id of one that is gone could be another's.
        self.met: dict[int, tuple[nnx.Variable[Array], _New]] = {}

    def __call__(self, variable: nnx.Variable[Array] | None) -> _New | None:
        if variable is None:
            return None
        if id(variable) not in self.met:
            self.met[id(variable)] = variable, self.convert(variable)
        return self.met[id(variable)][1]
