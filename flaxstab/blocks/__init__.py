"""Blocks with the parameter structure of their PyTorch counterparts, features last."""

from flaxstab.blocks._bottleneck import Bottleneck as Bottleneck
from flaxstab.blocks._bottleneck import PreActBottleneck as PreActBottleneck
from flaxstab.blocks._conv import ConvNormAct as ConvNormAct
from flaxstab.blocks._encoder_layer import TransformerDecoderLayer as TransformerDecoderLayer
from flaxstab.blocks._encoder_layer import TransformerEncoderLayer as TransformerEncoderLayer
from flaxstab.blocks._mlp import MLP as MLP
from flaxstab.blocks._parts import MakeNorm as MakeNorm
from flaxstab.blocks._residual import Residual as Residual
from flaxstab.blocks._resnet import BasicBlock as BasicBlock
from flaxstab.blocks._resnet import PreActResBlock as PreActResBlock
from flaxstab.blocks._transformer import TransformerBlock as TransformerBlock
