"""Residual blocks with the parameter structure of their PyTorch counterparts, features last."""

from flaxstab.blocks._parts import MakeNorm as MakeNorm
from flaxstab.blocks._resnet import BasicBlock as BasicBlock
from flaxstab.blocks._resnet import PreActResBlock as PreActResBlock
