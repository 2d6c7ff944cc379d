"""``flaxstab.interop`` and files: what is read, what is written, and what is refused."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
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


# Refusals. Each writer gets a folder and returns the path that is asked for.


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def torch_bomb(folder: Path) -> Path:
    torch.save({"a": Bomb(folder / "ran")}, folder / "a.pt")
    return folder / "a.pt"


def pickled_bomb(ending: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"a{ending}"
        path.write_bytes(pickle.dumps(Bomb(folder / "ran"), 2))
        return path

    return write


def bomb_as_safetensors(folder: Path) -> Path:
    return torch_bomb(folder).rename(folder / "a.safetensors")


def tar_bomb(folder: Path) -> Path:
    code = pickle.dumps(Bomb(folder / "ran"), 2)
    with tarfile.open(folder / "a.pt", "w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(code)
            tar.addfile(entry, io.BytesIO(code))
    return folder / "a.pt"


def zip_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    return folder / "a.pt"


def repeated(folder: Path) -> Path:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, folder / "a.pt")
    return folder / "a.pt"


def half(ending: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = interop.save_safetensors(Two(1), folder / "a.safetensors")
        if ending == ".pt":
            torch.save(torch_two().state_dict(), folder / "a.pt")
            path = folder / "a.pt"
        path.write_bytes(path.read_bytes()[:-20])
        return path

    return write


def raw(header: object, data: bytes = b"", length: int | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        words = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(words) if length is None else length
        (folder / "a.safetensors").write_bytes(size.to_bytes(8, "little") + words + data)
        return folder / "a.safetensors"

    return write


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def index(change: Callable[[dict[str, str], Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = interop.save_safetensors(Two(1), folder / "a.safetensors", max_shard_size=60)
        found = json.loads(path.read_text())
        change(found["weight_map"], folder)
        path.write_text(json.dumps(found))
        return path

    return write


def outside(name: str) -> Callable[[Path], Path]:
    def move(where: dict[str, str], folder: Path) -> None:
        interop.save_safetensors(Two(), folder.parent / "x.safetensors")  # it is there
        where["first.bias"] = name.format(folder.parent)

    return index(move)


def twice(where: dict[str, str], folder: Path) -> None:
    shard = folder / where["last.weight"]
    _safetensors.write(shard, interop.read_tensors(shard) | {"first.weight": np.ones(4)}, {})


def missing_shard(where: dict[str, str], folder: Path) -> None:
    (folder / where["last.weight"]).unlink()


def folder_of_two(folder: Path) -> Path:
    interop.save_safetensors(Two(), folder / "a.safetensors")
    interop.save_safetensors(Two(), folder / "b.safetensors")
    return folder


def text(name: str, words: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(words)
        return folder / name

    return write


DEEP = b"[" * 100_000
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "code in a zip": (torch_bomb, "must hold tensors alone, got code"),
    "code in a pickle": (pickled_bomb(".pt"), "must hold tensors alone, got code"),
    "code in a tar": (tar_bomb, "must hold tensors alone, got"),
    "code as safetensors": (bomb_as_safetensors, "It is a PyTorch file by its content: name it"),
    "a pickle as safetensors": (pickled_bomb(".safetensors"), "name it .pt"),
    "a whole module": (
        lambda folder: torch.save(T.Linear(1, 1), folder / "a.pt") or folder / "a.pt",
        "Save module.state_dict()",
    ),
    "no tensors": (
        lambda folder: torch.save({"epoch": 3}, folder / "a.pt") or folder / "a.pt",
        r"must hold tensors by name, in one entry at most, got found='dict'",
    ),
    "a zip that unpacks to more": (zip_bomb, "must not be compressed"),
    "a tensor larger than its storage": (repeated, "must hold plain, dense tensors"),
    "half of a pt": (half(".pt"), "fetch the file again if it is damaged"),
    "half of a safetensors": (half(".safetensors"), "must be as long as its header says"),
    "more than the header": (raw({"a": entry()}, b"\0" * 9), "must be as long as its header says"),
    "an empty file": (text("a.safetensors", ""), "must not be empty"),
    "seven bytes": (text("a.safetensors", "1234567"), "must begin with the length of its header"),
    "a header beyond the file": (raw({}, length=3), "must have a header no longer than the file"),
    "a header of 2**63": (raw({}, length=2**63), "must have a header no longer than the file"),
    "no JSON": (raw(b"{{}}"), "must hold JSON, got"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "must hold JSON, got"),
    "deep JSON": (raw(DEEP), "must hold JSON, got"),
    "a list": (raw([]), "must hold an object of JSON, got found='list'"),
    "NaN": (raw(b'{"a": NaN}'), "got NaN, a number that is not finite"),
    "a name twice": (raw(b'{"a": 1, "a": 1}'), "got 'a' twice"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "must have metadata of strings"),
    "an unknown dtype": (raw({"a": entry(dtype="F4")}, b"\0" * 8), "must hold a dtype in BOOL, "),
    "the wrong dtype": (raw({"a": entry(dtype="F64")}, b"\0" * 8), "as the tensor has bytes, 16"),
    "a negative size": (raw({"a": entry(shape=[-2])}, b"\0" * 8), "two offsets"),
    "a fraction": (raw({"a": entry(shape=[2.0])}, b"\0" * 8), "two offsets"),
    "a size of true": (raw({"a": entry(shape=[True])}, b"\0" * 8), "two offsets"),
    "an absurd size": (raw({"a": entry(shape=[0, 2**70])}, b"\0" * 8), "two offsets"),
    "huge sizes": (raw({"a": entry(shape=[2**40] * 9)}, b"\0" * 8), "as the tensor has bytes"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [2]}}), "two offsets"),
    "no entry": (raw({"a": 1}), "two offsets"),
    "offsets that overlap": (
        raw({"a": entry(), "b": entry(data_offsets=[4, 12])}, b"\0" * 12),
        "without gaps and overlaps, got tensor='b'",
    ),
    "a gap": (
        raw({"a": entry(), "b": entry(data_offsets=[12, 20])}, b"\0" * 20),
        "without gaps and overlaps, got tensor='b'",
    ),
    "offsets beyond the file": (
        raw({"a": entry(data_offsets=[8, 16])}, b"\0" * 8),
        "without gaps and overlaps",
    ),
    "a boolean of 2": (
        raw({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"),
        "must hold booleans of 0 and 1",
    ),
    "a pointer of Git LFS": (text("a.safetensors", "version https://git-lfs"), "git lfs pull"),
    "a shard that is missing": (index(missing_shard), "must name files that are there"),
    "a shard above": (outside("../x.safetensors"), "must name files of its own folder"),
    "a shard anywhere": (outside("{}/x.safetensors"), "must name files of its own folder"),
    "a shard on Windows": (outside("..\\x.safetensors"), "must name files of its own folder"),
    "a shard without name": (outside(""), "must name files of its own folder"),
    "a tensor that its shard lacks": (
        index(lambda where, _: where.update(more=where["first.bias"])),
        "must name the file that holds a tensor, got tensor='more'",
    ),
    "a tensor in another shard": (
        index(lambda where, _: where.update({"first.bias": where["first.weight"]})),
        "must name the file that holds a tensor, got tensor='first.bias'",
    ),
    "a tensor that the index lacks": (
        index(lambda where, _: where.pop("first.bias")),
        "must name the file that holds a tensor, got tensor='first.bias'",
    ),
    "a tensor in two shards": (index(twice), "must have every tensor in one file"),
    "an index without map": (text("a.safetensors.index.json", "{}"), "must have a weight_map"),
    "an index of numbers": (
        text("a.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        "must have a weight_map",
    ),
    "an empty folder": (lambda folder: folder, "a folder must hold one index of safetensors"),
    "a folder of two": (folder_of_two, r"got folder=.* and found=\['a.safetensors', 'b"),
    "no file": (lambda folder: folder / "a.safetensors", "There is none"),
    "another ending": (text("a.npz", "x"), "a file of tensors must end in .safetensors"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path, model = write(folder), Two()
    before = {n: bits(a) for n, a in interop.state_dict(model).items()}
    with pytest.raises(ValueError, match=message) as refused:
        interop.read_tensors(path)
    assert "\n" not in str(refused.value)
    assert path.name in str(refused.value)
    if path.suffix in (".safetensors", ".json", ""):
        with pytest.raises(ValueError, match=message):
            interop.load_safetensors(model, path)
    assert {n: bits(a) for n, a in interop.state_dict(model).items()} == before
    assert not (folder / "ran").exists()


def test_the_bombs_go_off_elsewhere(tmp_path: Path) -> None:
    torch.load(torch_bomb(tmp_path), weights_only=False)["a"].close()
    assert (tmp_path / "ran").exists()


def test_any_changed_byte_of_a_header_is_read_or_refused(tmp_path: Path) -> None:
    path = interop.save_safetensors(Two(), tmp_path / "a.safetensors")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    start = _safetensors.read_header(path).start
    refused = 0
    for place in rng.integers(0, start, 400):
        changed = bytearray(whole)
        changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            interop.read_tensors(path)
        except ValueError:
            refused += 1
    assert refused > 200


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    path, model = interop.save_safetensors(Two(), tmp_path / "a.safetensors"), Two(1)
    before = bits(model.first.kernel[...])
    with pytest.raises(ValueError, match="rename must keep names apart"):
        interop.load_safetensors(model, path, rename=lambda name: name.split(".")[-1])
    assert bits(model.first.kernel[...]) == before


def test_what_does_not_fit_the_model_leaves_it_as_it_was(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", Two()
    before = jax.tree.map(bits, interop.state_dict(model))
    tensors = interop.state_dict(Two(1)) | {"last.bias": np.ones(5, np.float32)}
    _safetensors.write(path, tensors, {})
    with pytest.raises(ValueError, match=r"last.bias \(5,\) for \(4,\)"):
        interop.load_safetensors(model, path)
    assert jax.tree.map(bits, interop.state_dict(model)) == before


def test_saving_is_refused_where_it_cannot_be_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got path='a.pt'"):
        interop.save_safetensors(Two(), "a.pt")
    with pytest.raises(ValueError, match="a file must be named in a folder that exists"):
        interop.save_safetensors(Two(), tmp_path / "none" / "a.safetensors")
    with pytest.raises(ValueError, match="max_shard_size must be an integer of at least 1"):
        interop.save_safetensors(Two(), tmp_path / "a.safetensors", max_shard_size=0)
    with pytest.raises(ValueError, match="safetensors must know the dtype of every tensor"):
        _safetensors.write(tmp_path / "a.safetensors", {"a": np.ones(1, np.complex128)}, {})
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="path must name safetensors"):
        interop.load_safetensors(Two(), tmp_path / "a.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_missing_torch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch_two().state_dict(), tmp_path / "a.pt")
    path = interop.save_safetensors(Two(), tmp_path / "a.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'flaxstab\[torch\]'"):
        interop.read_tensors(tmp_path / "a.pt")
    assert interop.load_safetensors(Two(), path).complete  # needs none


def test_tensors_do_not_share_memory_with_arrays() -> None:
    array = np.zeros((2, 2), np.float32)
    tensors = _torch.to_tensors({"a": [array, {"b": (array.T, 3)}]})
    tensors["a"][0].fill_(1)
    assert array.sum() == 0
    assert tensors["a"][1]["b"][1] == 3
