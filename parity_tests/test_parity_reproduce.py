"""A failure becomes a script that shows it alone, with as little as possible, until it is gone."""

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import linear, norms, parity
from flaxstab.parity import Reproduction, reproduce
from flaxstab.parity._script import INLINE, script
from flaxstab.parity._sources import folders, imports, source_of
from flaxstab.parity._specimen import Draft, differs, flax_leaves, save, shrunk
from parity_tests.support.pairs import refusal

RUN = """
import runpy, sys
sys.modules["flaxstab"] = None  # a script that imports it fails
for path in sys.argv[1:]:
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(f"EXIT {end.code}")
"""


def normal(*shape: int, mean: float = 1.0) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, 1.0, shape)


def momentum(folder: Path) -> Reproduction:
    """PyTorch's momentum given to Flax, which weighs the old value."""
    ours = nnx.BatchNorm(4, momentum=0.1, epsilon=1e-5, rngs=nnx.Rngs(0))
    theirs, images = torch.nn.BatchNorm2d(4), normal(4, 6, 6, 4)
    return reproduce(ours, theirs, images, layout="image", dtypes=(), path=folder / "momentum.py")


def fast_variance(folder: Path) -> Reproduction:
    ours, theirs = nnx.LayerNorm(16, epsilon=1e-5, rngs=nnx.Rngs(0)), torch.nn.LayerNorm(16)
    return reproduce(ours, theirs, normal(6, 16, mean=1e3), path=folder / "fast_variance.py")


def amsgrad(folder: Path) -> Reproduction:
    """The transformation takes the maximum of the bias-corrected moment, torch of the plain one."""
    return reproduce(
        optax.amsgrad(1e-3), lambda ps: torch.optim.Adam(ps, amsgrad=True), normal(4, 3), normal(5),
        dtypes=(), path=folder / "amsgrad.py", flax_source="optax.amsgrad(1e-3)",
    )  # fmt: skip


MENDED = {
    "momentum": ("momentum=0.1", "momentum=0.9"),
    "fast_variance": ("nnx.LayerNorm(", "nnx.LayerNorm(use_fast_variance=False, "),
    "amsgrad": ("amsgrad", "adam"),
}


class Planted:
    """Three faults, their scripts, and what these print: first as written, then mended."""

    def __init__(self, folder: Path) -> None:
        makers = (momentum, fast_variance, amsgrad)
        self.found = {make.__name__: make(folder) for make in makers}
        self.texts = {name: found.path.read_text() for name, found in self.found.items()}
        paths = [found.path for found in self.found.values()]
        for name, (old, new) in MENDED.items():
            text = self.texts[name].replace(old, new).replace("adam=True", "amsgrad=False")
            paths.append(folder / f"mended_{name}.py")
            paths[-1].write_text(text)
        driver = folder / "driver.py"
        driver.write_text(RUN)
        command = [sys.executable, str(driver), *map(str, paths)]
        run = subprocess.run(  # noqa: S603
            command, check=True, capture_output=True, text=True, cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip
        self.printed = run.stdout.split("EXIT ")
        self.codes = [int(part[0]) for part in self.printed[1:]]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("scripts"))


def test_a_script_exits_with_1_while_the_difference_exists_and_with_0_when_it_is_gone(
    planted: Planted,
) -> None:
    assert planted.codes == [1, 1, 1, 0, 0, 0], planted.printed


def test_a_script_prints_both_results_the_truth_and_the_ratio(planted: Planted) -> None:
    for printed in planted.printed[:3]:
        assert "JAX in " in printed
        assert "PyTorch in " in printed
        assert " x the limit (jax " in printed
        assert "the difference exists" in printed
    assert "PyTorch in float64" in planted.printed[1]
    assert all("the difference is gone" in printed for printed in planted.printed[3:6])


def test_the_case_is_minimal(planted: Planted) -> None:
    quantities = {name: (f.quantity, f.shapes, f.layer) for name, f in planted.found.items()}
    assert quantities == {
        "momentum": ("step 1 running_mean in float64", ((1, 1, 1, 1),), ""),
        "fast_variance": ("output in float32", ((1, 2),), ""),
        "amsgrad": ("the change after 2 steps in float64", ((1,),), ""),
    } or quantities["momentum"][0].startswith("step 1 running_")
    assert planted.found["momentum"].flax.startswith("nnx.BatchNorm(num_features=1, momentum=0.1")
    assert planted.found["momentum"].torch == "torch.nn.BatchNorm2d(num_features=1, bias=False)"


def test_a_small_script_stands_alone_in_one_file(planted: Planted) -> None:
    for found in planted.found.values():
        assert not found.path.with_suffix(".npz").exists()
        text = found.path.read_text()
        assert "flaxstab" not in text.split('"""')[2]  # behind its own words
        assert "pickle" not in text
        assert "Exit code: 1 while the difference exists" in text
        assert found.path.name in str(found)


def test_the_first_layer_that_differs_is_shown(tmp_path: Path) -> None:
    rngs = nnx.Rngs(0)
    ours = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs))  # eps 1e-6
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    found = reproduce(ours, theirs, normal(5, 4), dtypes=(), path=tmp_path / "layer.py")
    assert (found.layer, found.quantity) == ("1", "output in float64")
    assert found.flax.startswith("nnx.LayerNorm(num_features=2")
    assert found.shapes == ((1, 2),)
    assert "(1)." in found.path.read_text()


LINEAR = {  # a quantity, and the tensor that it notices
    "output": "weight", "evaluation": "bias", "step 2 output": "weight", "grad input 0": "weight",
    "grad weight": None, "grad bias": None,
}  # fmt: skip
NORM = {
    "output": "weight", "step 1 running_mean": "running_mean", "step 10 running_var": "running_var",
    "evaluation": "running_var", "after evaluation running_var": "running_var",
    "step 2 num_batches_tracked": "num_batches_tracked", "grad weight": None,
}  # fmt: skip


def draft(
    name: str, flax: nnx.Module, theirs: torch.nn.Module, x: np.ndarray, **more: object
) -> Draft:
    """Returns a pair whose weights have been carried from PyTorch to Flax."""
    pair = parity._models.Pair(flax, theirs, (x,), layout=more.get("layout"))
    ours, twin = pair.sides()
    names, leaves = flax_leaves(ours)
    drawn = [jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) for a in leaves]
    held = [None if key else np.asarray(a) for a, key in zip(leaves, drawn, strict=True)]
    arrays = {n: t.numpy() for n, t in twin.state_dict().items()}
    settings = {"dtype": "float64", "layout": None, "bound": 1e-12, **more}
    return Draft(
        source_of(ours, "", "flax_source"), source_of(twin, "", "torch_source"),
        dict(zip(names, held, strict=True)), arrays, (x,), name, **settings,
    )  # fmt: skip


def test_a_script_finds_nothing_in_a_pair_that_agrees_whatever_the_quantity() -> None:
    torch.manual_seed(0)
    rows = [
        (LINEAR, linear.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2), normal(4, 3), None),
        (NORM, norms.BatchNorm(3), torch.nn.BatchNorm2d(3), normal(2, 4, 4, 3), "image"),
    ]
    for names, ours, theirs, x, layout in rows:
        for name, noticed in names.items():
            one = draft(name, ours, theirs, x, layout=layout)
            assert not differs(one.specimen()), name
            moved = {n: a + (n == noticed) for n, a in one.torch_arrays.items()}
            if noticed is not None:
                assert differs(replace(one, torch_arrays=moved).specimen()), name
            else:  # a gradient does not depend on its own tensor: reverse what it is compared by
                kept = one.specimen()
                move = kept.quantity.move + "[::-1]"
                assert differs(kept._replace(quantity=kept.quantity._replace(move=move))), name


def test_a_script_judges_float32_against_its_own_float64() -> None:
    torch.manual_seed(0)
    x = normal(4, 3).astype(np.float32).astype(np.float64)
    ours, theirs = linear.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2)
    one = draft("output", ours, theirs, x, dtype="float32", bound=2e-7)
    assert not differs(one.specimen())
    assert differs(one.specimen()._replace(bound=-1.0))


def test_a_dropout_is_given_jaxs_mask() -> None:
    x = normal(4, 8)
    ours, theirs = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), torch.nn.Dropout(0.5)
    for name in ("output", "grad input 0"):
        one = draft(name, ours, theirs, x, mask=0.5).specimen()
        assert not differs(one)
        assert differs(one._replace(mask=0.25))  # another scale


def test_options_features_and_spatial_sizes_are_cut() -> None:
    """A padding of another kind is left with one element."""
    ours = nnx.Conv(3, 4, (3, 3), strides=2, padding=1, rngs=nnx.Rngs(0))
    theirs = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular")
    one = draft("output", ours, theirs, normal(2, 8, 8, 3), layout="image")
    best, _ = shrunk(one, 60.0)
    assert best.inputs[0].shape == (1, 1, 1, 1)
    assert "kernel_size=(1, 1)" in best.flax.text
    assert "strides=1" in best.flax.text
    assert "bias=False" in best.torch.text


def test_many_numbers_lie_beside_the_script_without_pickle(tmp_path: Path) -> None:
    x = normal(INLINE, 3)
    one = draft("output", linear.Linear(3, 2, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 2), x)
    made = script(one.specimen())
    path = save(made, tmp_path / "large.py")
    assert len(made.text) < 10_000
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as held:
        np.testing.assert_array_equal(held["input 0"], x)
    assert "allow_pickle=False" in made.text
    _, _, _, error, limit = runpy.run_path(str(path), run_name="probe")["measure"]()
    assert error <= limit


def test_what_cannot_be_a_script_is_refused_with_the_way_out(tmp_path: Path) -> None:
    x, path = normal(4, 4), tmp_path / "r.py"
    adam = (optax.adam(1e-3), lambda ps: torch.optim.SGD(ps, lr=1.0), x)
    differ = (nnx.relu, torch.tanh, x)

    def made(*sides: object, to: Path = path, **more: str) -> str:
        return refusal(lambda: reproduce(*sides, path=to, dtypes=(), **more))

    assert "two sides must differ, got verdict='agree'" in made(nnx.relu, torch.relu, x)
    assert "path must end in .py" in made(*differ, to=tmp_path / "r.txt")
    assert "Pass flax_source='my_models.Net(" in made(lambda x: x, torch.tanh, x)
    assert "must be a Python expression" in made(*differ, flax_source="nnx.")
    assert "got name='nowhere.tanh'" in made(*differ, torch_source="nowhere.tanh")
    assert "Pass flax_source=" in made(*adam)
    assert "a folder that exists" in made(*differ, to=tmp_path / "no" / "r.py")
    assert list(tmp_path.iterdir()) == []


def test_a_source_imports_what_it_names() -> None:
    assert imports(
        "optax.chain(optax.clip(1.0), my(2) if True else None)".replace("my(2)", "abs(2)")
    ) == ["import optax"]
    assert imports("lambda ps: torch.optim.Adam(ps)", "jnp.ones(3)", "nnx.relu") == [
        "from flax import nnx", "import jax.numpy as jnp", "import torch",
    ]  # fmt: skip
    assert imports("parity_tests.support.pairs.Net(0.5)") == ["import parity_tests.support.pairs"]
    assert folders(["import parity_tests.support.pairs"]) == [str(Path(__file__).parents[1])]
    assert folders(["import json", "from flax import nnx"]) == []
