"""PyTorch's optimizers as optax transformations: decay masks, AdamW, clipping, schedules."""

from flaxstab.optim._adam import adamw as adamw
from flaxstab.optim._clip import ClipState as ClipState
from flaxstab.optim._clip import clip_grad_norm as clip_grad_norm
from flaxstab.optim._masks import DecayMask as DecayMask
from flaxstab.optim._masks import decay_mask as decay_mask
from flaxstab.optim._schedules import warmup_cosine as warmup_cosine
