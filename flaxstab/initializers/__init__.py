"""PyTorch's ``torch.nn.init`` as JAX initializers: ``(key, shape, dtype) -> Array``.

Shapes are Flax's: ``(in, out)`` for a linear kernel, ``(*window, in, out)`` for a convolution;
``in_axis`` and ``out_axis`` name other places (PyTorch's axes 1 and 0). Every function returns a
closure that serves as ``kernel_init`` or ``bias_init`` of any NNX or Linen layer. Low-precision
values are drawn in float32 and cast, as PyTorch does.
"""

from flaxstab.initializers._defaults import torch_attention as torch_attention
from flaxstab.initializers._defaults import torch_bias as torch_bias
from flaxstab.initializers._defaults import torch_embedding as torch_embedding
from flaxstab.initializers._defaults import torch_recurrent as torch_recurrent
from flaxstab.initializers._defaults import torch_weight as torch_weight
from flaxstab.initializers._fans import XAVIER as XAVIER
from flaxstab.initializers._fans import FanMode as FanMode
from flaxstab.initializers._fans import Nonlinearity as Nonlinearity
from flaxstab.initializers._fans import calculate_gain as calculate_gain
from flaxstab.initializers._fans import fan_in_and_fan_out as fan_in_and_fan_out
from flaxstab.initializers._fans import kaiming_normal as kaiming_normal
from flaxstab.initializers._fans import kaiming_uniform as kaiming_uniform
from flaxstab.initializers._fans import xavier_normal as xavier_normal
from flaxstab.initializers._fans import xavier_uniform as xavier_uniform
from flaxstab.initializers._plain import constant as constant
from flaxstab.initializers._plain import normal as normal
from flaxstab.initializers._plain import ones as ones
from flaxstab.initializers._plain import trunc_normal as trunc_normal
from flaxstab.initializers._plain import uniform as uniform
from flaxstab.initializers._plain import zeros as zeros
from flaxstab.initializers._structured import dirac as dirac
from flaxstab.initializers._structured import eye as eye
from flaxstab.initializers._structured import orthogonal as orthogonal
from flaxstab.initializers._structured import sparse as sparse
