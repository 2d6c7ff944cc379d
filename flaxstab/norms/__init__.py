"""Normalisation layers with PyTorch's arguments, defaults and running statistics."""

from flaxstab.norms._batch import BatchNorm as BatchNorm
from flaxstab.norms._batch import GhostBatchNorm as GhostBatchNorm
from flaxstab.norms._frozen import FrozenBatchNorm as FrozenBatchNorm
from flaxstab.norms._fused import norm_act as norm_act
from flaxstab.norms._fused import norm_add_act as norm_add_act
from flaxstab.norms._sample import GroupNorm as GroupNorm
from flaxstab.norms._sample import InstanceNorm as InstanceNorm
from flaxstab.norms._sample import LayerNorm as LayerNorm
from flaxstab.norms._sample import RMSNorm as RMSNorm
