"""Versions and ranges of versions, compared as Python packaging does, without needing it."""

import re

WORD = re.compile(r"(?:\d+!)?(\d+(?:\.\d+)*)(?:[._-]?(a|b|rc|post|dev)[._-]?(\d*))?(?:\+[\w.]+)?$")
PHASES = {"dev": -4, "a": -3, "b": -2, "rc": -1, "": 0, "post": 1}
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
PIN = re.compile(rf"({NAME})(?:\s*==\s*([A-Za-z0-9][A-Za-z0-9.!+]*))?$")


def key(version: str) -> tuple[tuple[int, ...], int, int]:
    """Returns what orders versions; what follows a ``+`` is ignored.

    Raises:
      ValueError: if it is no version.

    Example:
      >>> key("0.12.0") < key("0.12.0.1") < key("0.12.10") and key("1.0rc1") < key("1.0")
      True
      >>> key("2.13.0+cpu") == key("2.13")
      True
    """
    found = WORD.match(version)
    if found is None:
        raise ValueError(f"a version must be like 0.12.8, got {version!r}.")
    numbers = [int(part) for part in found[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), PHASES[found[2] or ""], int(found[3] or 0)


def order(version: str) -> tuple[tuple[int, ...], int, int]:
    """Returns what orders installed versions; of an odd one what its first numbers say.

    Example:
      >>> order("0.12.8-mine+dirty") == order("0.12.8")
      True
    """
    try:
        return key(version)
    except ValueError:
        numbers = re.match(r"\d+(\.\d+)*", version)
        return key(numbers[0] if numbers else "0")


def within(version: str, bounds: str) -> bool:
    """Tells whether a version lies in a range; '' is every version.

    Example:
      >>> within("0.11.1", ">=0.11.1,<0.11.2"), within("0.11.2", ">=0.11.1,<0.11.2")
      (True, False)
    """
    for bound in filter(None, bounds.split(",")):
        sign, other = (bound[:2], bound[2:]) if bound[1] == "=" else (bound[0], bound[1:])
        left, right = order(version), key(other)
        holds = {">=": left >= right, "<": left < right, "==": left == right}[sign]
        if not holds:
            return False
    return True


def parse_pins(words: str) -> dict[str, str]:
    """Reads ``"jax==0.10.2,flax==0.12.8"``; a name alone is given the version ''.

    Names and versions only: no paths, addresses, options, extras or markers, since a package is
    installed of what this returns.

    Raises:
      ValueError: if a part is neither ``name==version`` nor a name, or a name comes twice.

    Example:
      >>> parse_pins("jax==0.10.2, Orbax_Checkpoint")
      {'jax': '0.10.2', 'orbax-checkpoint': ''}
    """
    pins: dict[str, str] = {}
    for part in re.split(r"[,\s]+(?![=\s])", re.sub(r"\s*==\s*", "==", words.strip())):
        found = PIN.match(part)
        if found is None:
            raise ValueError(
                f"versions must be like 'jax==0.10.2,flax==0.12.8', got {part!r} in {words!r}."
            )
        name = normal(found[1])
        if name in pins:
            raise ValueError(f"each package must be named once, got {name!r} twice in {words!r}.")
        if found[2]:
            key(found[2])
        pins[name] = found[2] or ""
    return pins


def normal(name: str) -> str:
    """Returns the one spelling of a package's name.

    Example:
      >>> normal("ML_Dtypes")
      'ml-dtypes'
    """
    return re.sub(r"[-_.]+", "-", name).lower()
