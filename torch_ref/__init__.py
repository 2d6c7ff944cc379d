"""The code of the two documents in plain PyTorch, written out by formula.

Nothing here imports JAX, Flax, optax or flaxstab: this package is one of the two sides that the
parity tests compare. File names mirror flaxstab's. Where a document is wrong, the docstring says
what it prints and what is done instead; names that end in ``_as_printed`` keep the document's
behaviour, so that the difference can be tested.
"""
