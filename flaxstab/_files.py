"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Writes a file beside its place and moves it there when it is complete.

    Args:
      path: where the file shall be; an older one is replaced. Its folder must exist.
      write: writes the file at the path that it is given.

    Returns:
      The path.

    Raises:
      ValueError: if there is no such folder, or the path is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(
            f"a file must be named in a folder that exists, got {str(target)!r}. "
            "Make the folder, or name a file in it."
        )
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        mode = target.stat().st_mode if target.exists() else 0o666 & ~_umask()
        unfinished.chmod(mode & 0o777)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _umask() -> int:
    """Returns the mask of a file's mode, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
