"""The documents' models, and ResNets and Transformers of flaxstab's blocks. Images are NHWC."""

from flaxstab.models._language import LMSize as LMSize
from flaxstab.models._language import TransformerLM as TransformerLM
from flaxstab.models._net import NetByApply as NetByApply
from flaxstab.models._net import NetByModules as NetByModules
from flaxstab.models._net import NetInConstructor as NetInConstructor
from flaxstab.models._small import CNN_BN as CNN_BN
from flaxstab.models._small import CNN_LN as CNN_LN
from flaxstab.models._small import SmallCNN as SmallCNN
from flaxstab.models._small import ToyDeep as ToyDeep
from flaxstab.models._stable import StableBlock as StableBlock
from flaxstab.models._stable import StableCNN as StableCNN
from flaxstab.models._stack import Stack as Stack
from flaxstab.models._stack import run as run
from flaxstab.models._vit import VIT_SMALL as VIT_SMALL
from flaxstab.models._vit import VIT_TINY as VIT_TINY
from flaxstab.models._vit import ViT as ViT
from flaxstab.models._vit import ViTSize as ViTSize
from flaxstab.models._vit import from_timm as from_timm
from flaxstab.models._vit import vit_small_patch16_224 as vit_small_patch16_224
from flaxstab.models._vit import vit_tiny_patch16_224 as vit_tiny_patch16_224
