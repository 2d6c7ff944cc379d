"""Walks a built model and changes it: weights, and residual branches that start at zero."""

from flaxstab.surgery._draw import init_layer as init_layer
from flaxstab.surgery._draw import redraw as redraw
from flaxstab.surgery._residual import last_parameters as last_parameters
from flaxstab.surgery._residual import refuse_post_norm as refuse_post_norm
from flaxstab.surgery._residual import register_residual as register_residual
from flaxstab.surgery._residual import zero_last_gamma as zero_last_gamma
from flaxstab.surgery._walk import Rule as Rule
from flaxstab.surgery._walk import init_weights as init_weights
