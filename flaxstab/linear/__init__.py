"""Linear, convolution and embedding layers with PyTorch's arguments and defaults."""

from flaxstab.linear._conv import Conv as Conv
from flaxstab.linear._conv import ConvTranspose as ConvTranspose
from flaxstab.linear._dense import Linear as Linear
from flaxstab.linear._embed import Embed as Embed
