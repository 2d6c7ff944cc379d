"""PyTorch's CPU random numbers, bit for bit, in numpy: no torch needed.

The numbers are those of the official x86-64 builds of PyTorch on a processor with AVX2 and FMA
(any since 2013; AVX-512 draws the same). numpy computes them on any machine. What to expect from
other builds of PyTorch is said at :class:`Generator`.
"""

from flaxstab.torch_rng._generator import Generator as Generator
from flaxstab.torch_rng._layers import Draw as Draw
from flaxstab.torch_rng._layers import Tensors as Tensors
from flaxstab.torch_rng._layers import layer_rule as layer_rule
from flaxstab.torch_rng._layers import register as register
from flaxstab.torch_rng._seed import seed_parameters as seed_parameters
