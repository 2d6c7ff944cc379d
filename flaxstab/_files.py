"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

Write = Callable[[Path], object]


def write_whole(path: str | os.PathLike[str], write: Write) -> Path:
    """Writes a file beside its place and moves it there when it is complete.

    Args:
      path: where the file shall be; an older one is replaced. Its folder must exist.
      write: writes the file at the path that it is given.

    Returns:
      The path.

    Raises:
      ValueError: if there is no such folder, or the path is a folder.
    """
    write_all({path: write})
    return Path(path)


def write_all(writes: Mapping[str | os.PathLike[str], Write]) -> None:
    """Writes files beside their places and moves them there, in order, when all are complete.

    Args:
      writes: each file's path and what writes it, as of :func:`write_whole`. The last one is moved
        last: let it be the one by which the others are found.

    Raises:
      ValueError: if one of the folders is missing, or a path is a folder.
    """
    targets = {Path(path): write for path, write in writes.items()}
    for target in targets:
        if not target.parent.is_dir() or target.is_dir():
            raise ValueError(
                f"a file must be named in a folder that exists, got {str(target)!r}. "
                "Make the folder, or name a file in it."
            )
    unfinished: dict[Path, Path] = {}
    try:
        for target, write in targets.items():
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            os.close(handle)
            unfinished[target] = Path(name)
            write(unfinished[target])
            mode = target.stat().st_mode if target.exists() else 0o666 & ~_umask()
            unfinished[target].chmod(mode & 0o777)
        for target, file in unfinished.items():
            file.replace(target)
    finally:
        for file in unfinished.values():
            file.unlink(missing_ok=True)


def _umask() -> int:
    """Returns the mask of a file's mode, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
