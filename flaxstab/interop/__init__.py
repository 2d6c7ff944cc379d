"""PyTorch weights in and out."""

from flaxstab.interop._files import load_safetensors as load_safetensors
from flaxstab.interop._files import read_tensors as read_tensors
from flaxstab.interop._files import save_safetensors as save_safetensors
from flaxstab.interop._linen import Places as Places
from flaxstab.interop._linen import linen_places as linen_places
from flaxstab.interop._linen import linen_state_dict as linen_state_dict
from flaxstab.interop._linen import load_linen_state_dict as load_linen_state_dict
from flaxstab.interop._naming import Naming as Naming
from flaxstab.interop._optimizer_state import (
    load_optimizer_state_dict as load_optimizer_state_dict,
)
from flaxstab.interop._optimizer_state import optimizer_state_dict as optimizer_state_dict
from flaxstab.interop._report import LoadEntry as LoadEntry
from flaxstab.interop._report import LoadReport as LoadReport
from flaxstab.interop._report import LoadWarning as LoadWarning
from flaxstab.interop._report import Outcome as Outcome
from flaxstab.interop._rules import register as register
from flaxstab.interop._stacks import register_container as register_container
from flaxstab.interop._stacks import register_stacked as register_stacked
from flaxstab.interop._state_dict import load_state_dict as load_state_dict
from flaxstab.interop._state_dict import state_dict as state_dict
from flaxstab.interop._torch import to_numpy as to_numpy
from flaxstab.interop._torch import to_tensors as to_tensors
from flaxstab.interop._torch_twin import Converter as Converter
from flaxstab.interop._torch_twin import from_torch as from_torch
from flaxstab.interop._torch_twin import register_twin as register_twin
from flaxstab.interop._walk import as_is as as_is
from flaxstab.interop._walk import named_modules as named_modules
