"""``flaxstab.interop`` and files: what is read and what is written."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from flaxstab import interop, linear, norms
from flaxstab.interop import _safetensors, _torch

T = torch.nn


class Two(nnx.Module):
    def __init__(self, seed: int = 0) -> None:
        self.first = linear.Linear(3, 4, rngs=nnx.Rngs(seed))
        self.last = norms.BatchNorm(4)


def torch_two() -> torch.nn.Module:
    torch.manual_seed(1)
    twin = T.ModuleDict({"first": T.Linear(3, 4), "last": T.BatchNorm1d(4)})
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 3 + 5)
    return twin


def bits(array: np.ndarray | torch.Tensor) -> tuple[object, ...]:
    """Everything about an array that must survive."""
    a = np.asarray(array)
    return str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()


def same(found: dict[str, np.ndarray], expected: dict[str, object]) -> bool:
    return found.keys() == expected.keys() and all(
        bits(found[name]) == bits(expected[name]) for name in expected
    )


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool",
    "complex64",
    *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)),
]  # fmt: skip


def every_dtype() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of odd shapes: none, no elements, prime, not contiguous."""
    torch.manual_seed(0)
    wide = {kind: (torch.randn(3, 5) * 40).abs().to(getattr(torch, kind)) for kind in DTYPES}
    wide |= {f"{kind} none": tensor[0, 0] for kind, tensor in wide.items()}
    return wide | {"empty": torch.empty(0, 3), "turned": torch.randn(2, 3).T}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits, by another way than the library's."""
    kind = str(tensor.dtype).removeprefix("torch.")
    dtype = getattr(ml_dtypes, kind, None) or np.dtype(kind)
    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    return np.frombuffer(raw, dtype).reshape(tuple(tensor.shape))


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".bin"])
def test_every_dtype_and_shape_is_read_bit_for_bit(ending: str, tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in every_dtype().items()}
    path = tmp_path / f"a{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    found = interop.read_tensors(path)
    assert same(found, {name: as_numpy(tensor) for name, tensor in tensors.items()})


def test_every_dtype_and_shape_is_written_as_the_reference_implementation_reads_it(
    tmp_path: Path,
) -> None:
    tensors = every_dtype()
    arrays = {name: as_numpy(tensor) for name, tensor in tensors.items()}
    arrays |= {"turned": arrays["turned"].T.copy().T, ">f4": np.arange(3, dtype=">f4")}
    path = tmp_path / "a.safetensors"
    _safetensors.write(path, arrays, {"format": "pt"})
    found = safetensors.torch.load_file(path)
    back = interop.to_tensors(arrays | {">f4": arrays[">f4"].astype("<f4")})
    for name, tensor in found.items():
        assert tensor.dtype == back[name].dtype
        assert bits(as_numpy(tensor)) == bits(as_numpy(back[name]))
    assert same(interop.read_tensors(path), {n: as_numpy(t) for n, t in found.items()})


def test_a_model_goes_out_to_torch_and_back(tmp_path: Path) -> None:
    source, target, twin = Two(), Two(1), torch_two()
    path = interop.save_safetensors(source, tmp_path / "a.safetensors")
    twin.load_state_dict(safetensors.torch.load_file(path))  # strict
    assert same(interop.state_dict(source), {n: t.numpy() for n, t in twin.state_dict().items()})
    assert interop.load_safetensors(target, path).complete
    assert same(interop.state_dict(target), interop.state_dict(source))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses a file


def test_the_model_does_not_share_memory_with_the_file(tmp_path: Path) -> None:
    source, model = Two(), Two(1)
    path = interop.save_safetensors(source, tmp_path / "a.safetensors")
    interop.load_safetensors(model, path)
    with path.open("r+b") as file:
        file.seek(_safetensors.read_header(path).start)
        file.write(b"\1" * 136)
    assert same(interop.state_dict(model), interop.state_dict(source))


def test_options_are_those_of_load_state_dict(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", Two()
    tensors = {f"module.{n}": t for n, t in torch_two().state_dict().items() if "bias" not in n}
    safetensors.torch.save_file(tensors, path)
    report = interop.load_safetensors(
        model, path, strict=False, rename=lambda name: name.removeprefix("module.")
    )
    assert report.missing == ("first.bias", "last.bias")
    assert np.array_equal(model.first.kernel[...].T, tensors["module.first.weight"])


@pytest.mark.parametrize("size", [1, 60, 100, 10_000])
def test_shards_are_those_of_the_hub_and_come_back(size: int, tmp_path: Path) -> None:
    model = Two()
    path = interop.save_safetensors(model, tmp_path / "model.safetensors", max_shard_size=size)
    names = sorted(file.name for file in tmp_path.iterdir())
    for place in (path, tmp_path):
        target = Two(1)
        assert interop.load_safetensors(target, place).complete
        assert same(interop.state_dict(target), interop.state_dict(model))
    if size == 10_000:
        assert names == ["model.safetensors"]
        return
    count = {1: 7, 60: 3, 100: 2}[size]
    shards = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert names == [*shards, "model.safetensors.index.json"]
    index = json.loads(path.read_text())
    assert index["metadata"] == {"total_size": 136}
    for name, shard in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / shard)


def test_nothing_is_left_of_shards_that_could_not_all_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    interop.save_safetensors(Two(), path, max_shard_size=60)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write, calls = _safetensors.write, []

    def fail(path: Path, **given: object) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError("disk full")
        write(path, **given)

    monkeypatch.setattr(_safetensors, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        interop.save_safetensors(Two(1), path, max_shard_size=60)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_of_a_checkpoint_the_only_entry_with_tensors_is_read(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.pt", torch_two().state_dict()
    expected = {name: tensor.numpy() for name, tensor in tensors.items()}
    optimizer = torch.optim.AdamW(torch_two().parameters()).state_dict()
    torch.save({"state_dict": tensors, "epoch": 3, "optimizer": optimizer}, path)
    assert same(interop.read_tensors(path), expected)
    torch.save({"model": {}, "ema": tensors, "raw": {"x": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"in one entry at most, got found=\['ema', 'raw'\]"):
        interop.read_tensors(path)
    assert same(interop.read_tensors(path, key="ema"), expected)
    with pytest.raises(ValueError, match="It has 'model', 'ema', 'raw'"):
        interop.read_tensors(path, key="EMA")


def test_an_older_file_of_torch_is_read(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.pth", torch_two().state_dict()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert same(interop.read_tensors(path), {n: t.numpy() for n, t in tensors.items()})


class Flat(nnx.Module):
    def __init__(self, seed: int) -> None:
        self.head = linear.Linear(2 * 3 * 4, 5, rngs=nnx.Rngs(seed))


def test_flattened_images_are_written_and_read_channels_first(tmp_path: Path) -> None:
    source, target, flattened = Flat(0), Flat(1), {"head": (2, 3, 4)}
    path = tmp_path / "a.safetensors"
    interop.save_safetensors(source, path, flattened=flattened)
    plain = interop.state_dict(source)
    assert same(interop.read_tensors(path), interop.state_dict(source, flattened=flattened))
    assert not np.array_equal(interop.read_tensors(path)["head.weight"], plain["head.weight"])
    interop.load_safetensors(target, path, flattened=flattened)
    assert same(interop.state_dict(target), plain)


def test_tensors_do_not_share_memory_with_arrays() -> None:
    array = np.zeros((2, 2), np.float32)
    tensors = _torch.to_tensors({"a": [array, {"b": (array.T, 3)}]})
    tensors["a"][0].fill_(1)
    assert array.sum() == 0
    assert tensors["a"][1]["b"][1] == 3
