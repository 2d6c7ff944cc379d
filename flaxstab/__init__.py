"""PyTorch's training semantics for JAX: Flax NNX layers, initializers and optimizers, proven equal.

Importing this package loads neither JAX nor PyTorch; import the module that you need:
``from flaxstab import norms, optim``.
"""

__version__ = "0.1.0.dev0"
