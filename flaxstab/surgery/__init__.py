"""Walks a built model and changes it: weights, norms, branches that start at zero."""

from flaxstab.surgery._draw import init_layer as init_layer
from flaxstab.surgery._draw import redraw as redraw
from flaxstab.surgery._norms import MakeNorm as MakeNorm
from flaxstab.surgery._norms import batch_to_group as batch_to_group
from flaxstab.surgery._norms import batch_to_layer as batch_to_layer
from flaxstab.surgery._norms import convert_sync_batch_norm as convert_sync_batch_norm
from flaxstab.surgery._norms import freeze_batch_norm as freeze_batch_norm
from flaxstab.surgery._norms import replace_norms as replace_norms
from flaxstab.surgery._norms import unfreeze_batch_norm as unfreeze_batch_norm
from flaxstab.surgery._residual import last_parameters as last_parameters
from flaxstab.surgery._residual import refuse_post_norm as refuse_post_norm
from flaxstab.surgery._residual import register_residual as register_residual
from flaxstab.surgery._residual import zero_last_gamma as zero_last_gamma
from flaxstab.surgery._walk import Rule as Rule
from flaxstab.surgery._walk import init_weights as init_weights
