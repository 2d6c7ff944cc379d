"""The cases that hold flaxstab to PyTorch; run with ``pytest``."""
