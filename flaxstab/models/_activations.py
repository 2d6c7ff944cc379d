"""The documents' activations by name."""

from collections.abc import Callable
from typing import Literal

from flaxstab import functional
from flaxstab._checks import check
from flaxstab._typing import Array

Act = Literal["relu", "gelu", "elu"]


_BY_NAME: dict[str, Callable[[Array], Array]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "elu": functional.elu,
}


def activation(act: str) -> Callable[[Array], Array]:
    """Returns the documents' activation of the given name; GELU is the exact one."""
    check(act in _BY_NAME, f"act must be one of {', '.join(_BY_NAME)}", act=act)
    return _BY_NAME[act]
