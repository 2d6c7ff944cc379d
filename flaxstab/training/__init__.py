"""What a training loop needs beside its step: early stopping."""

from flaxstab.training._early_stopping import EarlyStopping as EarlyStopping
from flaxstab.training._early_stopping import EarlyStoppingState as EarlyStoppingState
from flaxstab.training._early_stopping import early_stopping as early_stopping
