"""Says where in a model an error came from, in one line instead of a stack trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import numpy as np

from flaxstab._typing import Array


class Names(NamedTuple):
    """How the submodules of a side are recognised and named.

    Attributes:
      kind: their base class.
      name_of: from the model and a submodule to the submodule's name.
    """

    kind: type
    name_of: Callable[..., str]


@contextmanager
def located(side: str, names: Names | None, arrays: Sequence[np.ndarray | Array]) -> Iterator[None]:
    """Turns an error of a model into a ``ValueError`` that names the submodule and the line.

    Args:
      side: 'Flax' or 'PyTorch', for the message.
      names: of the submodules; None for a function.
      arrays: the inputs, whose shapes are told.

    Yields:
      Nothing.

    Raises:
      ValueError: for any exception inside.
    """
    try:
        yield
    except Exception as error:
        place = "the function" if names is None else _place(error.__traceback__, names)
        shapes = ", ".join(str(tuple(a.shape)) for a in arrays)
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"the {side} side must run on its inputs, got {type(error).__name__} in {place} "
            f"with inputs {shapes or 'none'}: {first}. "
            "Check the model alone, the inputs' shapes and layout='image'."
        ) from None


def _place(traceback: TracebackType | None, names: Names) -> str:
    """Returns the innermost submodule that was running, and its line."""
    stack, line = [], ""
    while traceback is not None:
        frame = traceback.tb_frame
        first = frame.f_code.co_varnames[:1]  # 'self', whatever it is called
        owner = frame.f_locals.get(first[0]) if first else None
        if isinstance(owner, names.kind):
            stack.append(owner)
            line = f"line {traceback.tb_lineno} of {frame.f_code.co_filename.rsplit('/', 1)[-1]}"
        traceback = traceback.tb_next
    if not stack:
        return "the model"
    name = names.name_of(stack[0], stack[-1])
    return f"{name or 'the model'} ({type(stack[-1]).__name__}, {line})"
