"""``torch_ref`` is the side without JAX: its sources import nothing of the other side."""

import ast
from pathlib import Path

import pytest

import torch_ref

FORBIDDEN = {"jax", "jaxlib", "jaxtyping", "flax", "optax", "flaxstab", "parity_tests"}
SOURCES = sorted(Path(torch_ref.__file__).parent.rglob("*.py"))


def forbidden_imports(source: str) -> set[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in {"__import__", "import_module", "importlib.import_module"}:
                names.append(str(node.args[0].value))
    return {name.split(".")[0] for name in names} & FORBIDDEN


def test_there_are_sources_to_look_at() -> None:
    assert {path.stem for path in SOURCES} >= {"__init__", "initializers", "training"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_imports_jax_flax_optax_or_flaxstab(path: Path) -> None:
    assert forbidden_imports(path.read_text()) == set()


@pytest.mark.parametrize(
    "planted",
    [
        "import jax.numpy as jnp",
        "from flax import nnx",
        "def f():\n    import optax",
        "from flaxstab.norms import BatchNorm",
        "import importlib\nimportlib.import_module('jax')",
    ],
)
def test_a_planted_import_is_found(planted: str) -> None:
    assert forbidden_imports(planted) != set()


def test_harmless_imports_are_not_reported() -> None:
    assert forbidden_imports("import math\nfrom torch import nn\nnn.Linear(1, 2)") == set()
