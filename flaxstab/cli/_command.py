"""What commands share: exit codes, and how one says that it cannot be carried out."""

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]

PASSED, FAILED, REFUSED = 0, 1, 2


def refuse(message: str) -> int:
    """Says in one line why a command was refused; returns the exit code."""
    sys.stderr.write(f"flaxstab: {message}\n")
    return REFUSED


def tell(words: str) -> None:
    """Shows progress, apart from the result."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def missing(*names: str) -> str:
    """Returns why a command cannot run without some packages; '' if all can be imported."""
    absent = [name for name in names if not imports(name)]
    if not absent:
        return ""
    return (
        f"{' and '.join(absent)} cannot be imported. Install them: pip install 'flaxstab[torch]'."
    )


def imports(name: str) -> bool:
    """Tells whether a module can be imported; one that fails in any way cannot."""
    try:
        import_module(name)
    except Exception:
        return False
    return True
