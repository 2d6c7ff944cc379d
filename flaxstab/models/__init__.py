"""The documents' models, and ResNets and Transformers of flaxstab's blocks. Images are NHWC.

``resnet18(num_classes=1000, *, stem="imagenet", …, rngs)`` and its like are :class:`ResNet` of a
size, ``vit_tiny_patch16_224(num_classes=1000, *, …, rngs)`` and its like :class:`ViT`: all their
options apply. ResNets have torchvision's parameters by name and shape, ViTs timm's by
:func:`from_timm`. :func:`flaxstab.interop.from_torch` knows torchvision's ResNets once this package
is imported.
"""

from flaxstab.models import _from_torch as _from_torch
from flaxstab.models._language import LMSize as LMSize
from flaxstab.models._language import TransformerLM as TransformerLM
from flaxstab.models._net import NetByApply as NetByApply
from flaxstab.models._net import NetByModules as NetByModules
from flaxstab.models._net import NetInConstructor as NetInConstructor
from flaxstab.models._resnet import RESNET18 as RESNET18
from flaxstab.models._resnet import RESNET34 as RESNET34
from flaxstab.models._resnet import RESNET50 as RESNET50
from flaxstab.models._resnet import RESNET101 as RESNET101
from flaxstab.models._resnet import RESNET152 as RESNET152
from flaxstab.models._resnet import ResNet as ResNet
from flaxstab.models._resnet import ResNetSize as ResNetSize
from flaxstab.models._resnet import preact_resnet18 as preact_resnet18
from flaxstab.models._resnet import preact_resnet34 as preact_resnet34
from flaxstab.models._resnet import preact_resnet50 as preact_resnet50
from flaxstab.models._resnet import preact_resnet101 as preact_resnet101
from flaxstab.models._resnet import preact_resnet152 as preact_resnet152
from flaxstab.models._resnet import resnet18 as resnet18
from flaxstab.models._resnet import resnet34 as resnet34
from flaxstab.models._resnet import resnet50 as resnet50
from flaxstab.models._resnet import resnet101 as resnet101
from flaxstab.models._resnet import resnet152 as resnet152
from flaxstab.models._small import CNN_BN as CNN_BN
from flaxstab.models._small import CNN_LN as CNN_LN
from flaxstab.models._small import SmallCNN as SmallCNN
from flaxstab.models._small import ToyDeep as ToyDeep
from flaxstab.models._stable import StableBlock as StableBlock
from flaxstab.models._stable import StableCNN as StableCNN
from flaxstab.models._stack import Chain as Chain
from flaxstab.models._stack import Stack as Stack
from flaxstab.models._stack import stacked as stacked
from flaxstab.models._stack import unstacked as unstacked
from flaxstab.models._vit import VIT_SMALL as VIT_SMALL
from flaxstab.models._vit import VIT_TINY as VIT_TINY
from flaxstab.models._vit import ViT as ViT
from flaxstab.models._vit import ViTSize as ViTSize
from flaxstab.models._vit import from_timm as from_timm
from flaxstab.models._vit import vit_small_patch16_224 as vit_small_patch16_224
from flaxstab.models._vit import vit_tiny_patch16_224 as vit_tiny_patch16_224
