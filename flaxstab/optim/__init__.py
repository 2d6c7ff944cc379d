"""PyTorch's optimizers as optax transformations: masks by role, groups, clipping, schedules."""

from flaxstab.optim._adam import AdamState as AdamState
from flaxstab.optim._adam import adam as adam
from flaxstab.optim._adam import adamw as adamw
from flaxstab.optim._clip import ClipState as ClipState
from flaxstab.optim._clip import clip_grad_norm as clip_grad_norm
from flaxstab.optim._clip import clip_grad_value as clip_grad_value
from flaxstab.optim._groups import ParamGroups as ParamGroups
from flaxstab.optim._groups import freeze as freeze
from flaxstab.optim._groups import param_groups as param_groups
from flaxstab.optim._groups import scale_updates as scale_updates
from flaxstab.optim._guard import skip_nonfinite as skip_nonfinite
from flaxstab.optim._layer_decay import LayerDecay as LayerDecay
from flaxstab.optim._layer_decay import layer_decay as layer_decay
from flaxstab.optim._masks import DecayMask as DecayMask
from flaxstab.optim._masks import Selection as Selection
from flaxstab.optim._masks import decay_mask as decay_mask
from flaxstab.optim._masks import select as select
from flaxstab.optim._schedules import cosine_annealing as cosine_annealing
from flaxstab.optim._schedules import document_schedule as document_schedule
from flaxstab.optim._schedules import linear_warmup as linear_warmup
from flaxstab.optim._schedules import one_cycle as one_cycle
from flaxstab.optim._schedules import step as step
from flaxstab.optim._schedules import warmup_cosine as warmup_cosine
from flaxstab.optim._sgd import SgdState as SgdState
from flaxstab.optim._sgd import sgd as sgd
from flaxstab.optim._thaw import thaw as thaw
