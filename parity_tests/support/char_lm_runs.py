"""Tiny runs of the character model, shared by its tests."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import _text
import char_lm
from _checkpoint import Checkpoints
from _language import LanguageRun, Settings

STEPS, EVERY = 12, 4
# Eleven windows: no number of the eight devices but one divides them.
SIZES = {"width": 8, "depth": 1, "heads": 2, "context": 8, "batch_size": 11, "steps": STEPS}
GRAPH, TREE = True, False
State = dict[str, bytes]


@pytest.fixture(scope="module", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Compiles in a third of the time: these programs run a few steps only."""
    name = "jax_disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "true")  # for the processes that tests start
        before = jax.config.read(name)
        jax.config.update(name, True)
        yield
        jax.config.update(name, before)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of Hamlet, so that a look at the validation part is one call."""
    path = tmp_path_factory.mktemp("text") / "page.txt"
    path.write_text(_text.SMALL.read_text("utf-8")[5000:6200], "utf-8")
    return path


def tiny(page: Path, folder: Path, *more: str) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    return [*sizes, f"--checkpoint-every={EVERY}", "--sample-length=4", f"--data={page}",
            f"--output={folder}", *more]  # fmt: skip


def resumed(page: Path, folder: Path, *more: str) -> list[str]:
    return [f"--resume={folder}", f"--checkpoint-every={EVERY}", "--sample-length=4",
            f"--data={page}", *more]  # fmt: skip


def run_of(page: Path, **changes: object) -> LanguageRun:
    text = _text.load_text(page)
    chosen = {**SIZES, "text": text.digest, "characters": len(text.characters), **changes}
    return LanguageRun(Settings(**chosen), text)


def bits(tree: object) -> State:
    """Every array by name, as bytes; keys of dropout as what they are made of."""
    flat, _ = jax.tree.flatten_with_path(tree)
    plain = {
        jax.tree_util.keystr(path): jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for path, leaf in flat
    }
    return {name: np.asarray(leaf).tobytes() for name, leaf in plain.items()}


def saved_bits(folder: Path, like: LanguageRun) -> State:
    checkpoints = Checkpoints(folder / "checkpoints")
    return bits(checkpoints.restore(checkpoints.latest(), like.state))


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged_steps(folder: Path) -> list[int]:
    return [r["step"] for r in records(folder) if "loss" in r]


@pytest.fixture(scope="module")
def whole(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert char_lm.main(tiny(page, folder)) == 0
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(char_lm, "save_figure", lambda *_: None)
