"""PyTorch weights in and out."""

from flaxstab.interop._rules import register as register
from flaxstab.interop._state_dict import LoadReport as LoadReport
from flaxstab.interop._state_dict import load_state_dict as load_state_dict
from flaxstab.interop._state_dict import named_modules as named_modules
from flaxstab.interop._state_dict import state_dict as state_dict
from flaxstab.interop._torch import to_numpy as to_numpy
