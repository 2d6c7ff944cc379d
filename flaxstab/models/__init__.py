"""The documents' models. Inputs are (N, H, W, C) or (N, C)."""

from flaxstab.models._net import NetByApply as NetByApply
from flaxstab.models._net import NetByModules as NetByModules
from flaxstab.models._net import NetInConstructor as NetInConstructor
from flaxstab.models._small import CNN_BN as CNN_BN
from flaxstab.models._small import CNN_LN as CNN_LN
from flaxstab.models._small import SmallCNN as SmallCNN
from flaxstab.models._small import ToyDeep as ToyDeep
from flaxstab.models._stable import StableBlock as StableBlock
from flaxstab.models._stable import StableCNN as StableCNN
