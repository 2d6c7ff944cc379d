"""Dropout layers: of elements, channels, samples and sequences."""

from flaxstab.dropout._layers import AlphaDropout as AlphaDropout
from flaxstab.dropout._layers import ChannelDropout as ChannelDropout
from flaxstab.dropout._layers import Dropout as Dropout
from flaxstab.dropout._layers import DropPath as DropPath
from flaxstab.dropout._recurrent import RecurrentDropout as RecurrentDropout
from flaxstab.dropout._recurrent import RecurrentDropoutCell as RecurrentDropoutCell
