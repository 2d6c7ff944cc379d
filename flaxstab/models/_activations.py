"""The documents' activations by name."""

from collections.abc import Callable
from typing import Literal

import jax

from flaxstab import functional
from flaxstab._checks import check
from flaxstab._typing import Array

Act = Literal["relu", "gelu", "elu"]


# Plain functions: jax.nn's own are compiled objects, which pickle refuses.
def relu(x: Array) -> Array:
    """Returns ``max(x, 0)``."""
    return jax.nn.relu(x)


def elu(x: Array) -> Array:
    """Returns ``x`` where it is positive, else ``exp(x) - 1``."""
    return jax.nn.elu(x)


_BY_NAME: dict[str, Callable[[Array], Array]] = {"relu": relu, "gelu": functional.gelu, "elu": elu}


def activation(act: str) -> Callable[[Array], Array]:
    """Returns the documents' activation of the given name; GELU is the exact one."""
    check(act in _BY_NAME, f"act must be one of {', '.join(_BY_NAME)}", act=act)
    return _BY_NAME[act]
