"""``flaxstab convert``: what it writes, what it says, how it exits."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from flax import nnx

from flaxstab import cli, interop, models
from flaxstab.cli import _convert
from flaxstab.interop import _safetensors
from parity_tests.test_cli import run as run_apart

Tensors = dict[str, np.ndarray]
CLASSES = 7


@pytest.fixture(scope="module")
def resnet() -> Tensors:
    """ResNet-18's tensors, every one different, as torchvision names them."""
    names = interop.state_dict(
        _convert._promised(lambda: models.resnet18(CLASSES, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)
    return {n: rng.uniform(0.5, 9.0, a.shape).astype(a.dtype) for n, a in names.items()}


def bits(array: np.ndarray) -> tuple[object, ...]:
    return array.dtype, array.shape, np.ascontiguousarray(array).tobytes()


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        bits(found[n]) == bits(a) for n, a in expected.items()
    )


def convert(*words: object) -> int:
    return cli.main(["convert", *map(str, words)])


RESNET = ("--model", "resnet18")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_flax_layout_and_back_keeps_every_bit_and_dtype(
    dtype: str, resnet: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(ml_dtypes, dtype, dtype)
    tensors = {n: a if a.dtype == np.int64 else a.astype(kind) for n, a in resnet.items()}
    given, flax, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    _safetensors.write(given, tensors, {})
    assert convert(given, flax, *RESNET, "--layout", "flax", "--check") == 0
    assert capsys.readouterr().out == (
        f"122 tensors loaded\n{flax} written, 122 tensors read again, equal bit for bit\n"
    )
    assert convert(flax, back, *RESNET, "--check") == 0
    assert same(interop.read_tensors(back), tensors)


def test_flax_layout_is_that_of_the_models_variables(resnet: Tensors, tmp_path: Path) -> None:
    given, flax = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    _safetensors.write(given, resnet, {})
    assert convert(given, flax, *RESNET, "--layout", "flax") == 0
    with safetensors.safe_open(flax, "np") as file:
        assert file.metadata() == {"format": "flaxstab", "layout": "flax"}
    model = _convert._promised(lambda: models.resnet18(CLASSES, rngs=nnx.Rngs(0)))
    found = safetensors.numpy.load_file(flax)
    state = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    assert {n: a.shape for n, a in found.items()} == {
        ".".join(map(str, path)): variable.shape for path, variable in state
    }
    conv = resnet["layer2.0.conv1.weight"]
    assert np.array_equal(found["layer2.0.conv1.kernel"], conv.transpose(2, 3, 1, 0))
    nnx.update(model, jax.tree.map(jnp.asarray, nnx.state(model, nnx.Not(nnx.RngState))))
    assert interop.load_safetensors(model, flax).complete
    assert np.array_equal(model.fc.kernel[...], resnet["fc.weight"].T)
    with pytest.raises(ValueError, match="the file must hold PyTorch's names, got Flax's"):
        interop.read_tensors(flax)


def test_a_table_has_a_line_for_every_tensor(
    resnet: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "a.safetensors"
    _safetensors.write(given, resnet, {})
    assert convert(given, tmp_path / "b.safetensors", *RESNET, "--table") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("loaded ") for line in lines) == len(resnet)


def test_a_checkpoints_entry_is_read(resnet: Tensors, tmp_path: Path) -> None:
    given, out = tmp_path / "a.pth", tmp_path / "b.safetensors"
    torch.save({"model": interop.to_tensors(resnet), "ema": {"x": torch.ones(1)}}, given)
    assert convert(given, out, *RESNET, "--key", "model", "--check") == 0
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert same(interop.read_tensors(out), resnet)


def timm_name(name: str) -> str:
    """The other way than ``models.from_timm``."""
    pairs = [
        (".ln1.", ".norm1."), (".ln2.", ".norm2."), (".attn.in_proj_", ".attn.qkv."),
        (".attn.out_proj.", ".attn.proj."), (".ff.0.", ".mlp.fc1."), (".ff.3.", ".mlp.fc2."),
    ]  # fmt: skip
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def test_a_vit_with_timms_names_gets_those_of_the_model(tmp_path: Path) -> None:
    model = _convert._promised(lambda: models.vit_tiny_patch16_224(CLASSES, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    ours = {
        n: rng.normal(size=a.shape).astype(np.float32) for n, a in interop.state_dict(model).items()
    }
    timm = {timm_name(n): a for n, a in ours.items()}
    assert [n for n in timm if models.from_timm(n) not in ours] == []
    assert "blocks.0.attn.qkv.weight" in timm
    assert [n for n in ours if models.from_timm(n) != n] == []  # what it writes it can read
    given, out = (tmp_path / f"{name}.safetensors" for name in "ab")
    _safetensors.write(given, timm, {})
    assert convert(given, out, "--model", "vit_tiny_patch16_224", "--check") == 0
    assert same(interop.read_tensors(out), ours)


def test_weights_of_another_model_are_told_and_nothing_is_written(
    resnet: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    out.write_text("old")
    _safetensors.write(given, resnet, {})
    assert convert(given, out, "--model", "resnet34") == 1
    said = capsys.readouterr()
    assert "80 missing: layer1.2.bn1.weight" in said.out
    assert said.out.endswith("the weights do not fit resnet34; nothing was written\n")
    assert convert(given, out, *RESNET, "--num-classes", 5) == 1
    assert "2 mismatched: fc.weight (7, 512) for (5, 512)" in capsys.readouterr().out
    assert out.read_text() == "old"


def test_check_finds_what_was_written_otherwise(
    resnet: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    _safetensors.write(given, resnet, {})
    write = _safetensors.write

    def one_bit(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
        changed = np.array(tensors["fc.bias"])
        changed.view(np.uint8)[0] ^= 1
        write(path, {**tensors, "fc.bias": changed}, metadata)

    monkeypatch.setattr(_safetensors, "write", one_bit)
    assert convert(given, out, *RESNET, "--check") == 1
    said = capsys.readouterr().out
    assert said.endswith("check: fc.bias is not what IN holds; nothing was written\n")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def headless(folder: Path) -> Path:
    _safetensors.write(folder / "a.safetensors", {"conv1.weight": np.ones(3, "f")}, {})
    return folder / "a.safetensors"


def other_flax(folder: Path) -> Path:
    tensors = {"fc.bias": np.ones(3, "f")}
    _safetensors.write(folder / "a.safetensors", tensors, {"format": "flaxstab", "layout": "flax"})
    return folder / "a.safetensors"


def code(folder: Path) -> Path:
    torch.save(torch.nn.Linear(1, 1), folder / "a.pt")
    return folder / "a.pt"


def damaged(folder: Path) -> Path:
    path = code(folder)
    path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\1\3"))
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "no file": (lambda folder: folder / "none.pt", "b.safetensors", "There is none"),
    "no tensors": (code, "b.safetensors", "must hold tensors alone"),
    "a damaged file": (damaged, "b.safetensors", "Fetch the file again"),
    "no classes": (headless, "b.safetensors", "Pass --num-classes"),
    "another model of Flax's": (other_flax, "b.safetensors", "must hold the model's variables"),
    "another ending": (headless, "b.npz", "path must end in .safetensors"),
    "no folder": (headless, "none/b.safetensors", "got conv1.weight, ... Pass --num-classes"),
}


@pytest.mark.parametrize(("write", "out", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line(
    write: Callable[[Path], Path],
    out: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(write(tmp_path), tmp_path / out, *RESNET) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("flaxstab: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_every_model_is_one_of_flaxstab_models() -> None:
    for name in _convert.MODELS:
        kind = models.ResNet if name.startswith("resnet") else models.ViT
        assert getattr(models, name).func is kind


def test_help_needs_no_framework() -> None:
    ended = run_apart(["convert", "--help"], "jax", "jaxlib", "flax", "optax", "torch", "numpy")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "vit_small_patch16_224" in ended.stdout


def test_an_index_is_read(resnet: Tensors, tmp_path: Path) -> None:
    first, *rest = (dict([pair]) for pair in resnet.items())
    names = {**dict.fromkeys(first, "x.safetensors")}
    _safetensors.write(tmp_path / "x.safetensors", first, {})
    others = {n: a for part in rest for n, a in part.items()}
    _safetensors.write(tmp_path / "y.safetensors", others, {})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names | dict.fromkeys(others, "y.safetensors")}))
    out = tmp_path / "out" / "b.safetensors"
    out.parent.mkdir()
    assert convert(tmp_path, out, *RESNET, "--check") == 0
    assert same(interop.read_tensors(out), resnet)
