"""Every type of normalisation layer there is, flaxstab's and NNX's."""

from flax import nnx

from flaxstab.norms._batch import BatchNorm, GhostBatchNorm
from flaxstab.norms._frozen import FrozenBatchNorm
from flaxstab.norms._sample import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

NORMS: tuple[type[nnx.Module], ...] = (
    BatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    nnx.BatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
)
