"""``docs/initializers.md`` has a row for all of ``torch.nn.init``, and names what exists."""

import importlib
import inspect
import re
from pathlib import Path

import jax
import pytest
import torch
from flax import nnx

from flaxstab import initializers

PAGE = Path(__file__).parents[1] / "docs" / "initializers.md"
if not PAGE.is_file():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Returns the cells of the table below a heading, without its two head lines."""
    section = TEXT.split(heading)[1].split("\n## ")[0]
    rows = [line.strip("| ") for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"\s\|(?:\s|$)", row)] for row in rows]


FUNCTIONS, LAYERS = table("## Every function of"), table("## What layers start with")
CODE = re.compile(r"`([^`(]+)[^`]*`")


def public(module: object, home: str) -> set[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name for name, f in functions if f.__module__.startswith(home) and name[0] != "_"}


def test_every_function_that_torch_exports_has_a_row() -> None:
    exported = public(torch.nn.init, "torch.nn.init") | set(torch.nn.init.__all__)
    assert {CODE.findall(row[0])[0] for row in FUNCTIONS} == exported
    assert len(FUNCTIONS) == len(exported)


def test_a_function_without_a_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def orthonormal_() -> None: ...

    orthonormal_.__module__ = "torch.nn.init"
    monkeypatch.setattr(torch.nn.init, "orthonormal_", orthonormal_, raising=False)
    with pytest.raises(AssertionError, match="orthonormal_"):
        test_every_function_that_torch_exports_has_a_row()


def test_every_row_names_a_function_of_ours() -> None:
    named = {name for row in FUNCTIONS + LAYERS for name in CODE.findall(row[2])}
    named |= {"fan_in_and_fan_out"} if "`fan_in_and_fan_out` is" in TEXT else set()
    assert named == public(initializers, "flaxstab.initializers")


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row[0])
def test_a_deprecated_alias_is_one(row: list[str]) -> None:
    """And the names of all others end in an underscore, or belong to helpers."""
    (name,) = CODE.findall(row[0])
    alias_of = re.match("deprecated alias of `(.*)`", row[1])
    documented = "deprecated" in (getattr(torch.nn.init, name).__doc__ or "")
    assert documented is (alias_of is not None)
    if alias_of:
        assert alias_of[1] == f"{name}_"


def test_every_name_of_jax_flax_and_torch_exists() -> None:
    names = set(re.findall(r"`((?:jax|nnx|torch)\.[\w.]+)", TEXT))
    roots = {"jax": jax, "nnx": nnx, "torch": torch}
    missing = []
    for name in names:
        root, *rest = name.split(".")
        found: object = roots[root]
        for part in rest:
            found = getattr(found, part, None)
        if found is None:
            missing.append(name)
    assert len(names) > 15
    assert missing == []


def test_the_pages_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    found: dict[str, object] = {}
    exec(code, found)  # noqa: S102
    assert str(found["low"].kernel[...].dtype) == "bfloat16"
    assert found["heads"].shape == (768, 12, 64)
    assert importlib.import_module("flaxstab.initializers") is found["initializers"]
