"""Files that ``flaxstab.interop`` refuses: in one line, with the model as it was."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from flaxstab import interop
from flaxstab.interop import _safetensors
from parity_tests.test_interop_files import Two, bits, torch_two

T = torch.nn

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


def torn(folder: Path) -> Path:
    torch.save(torch_two().state_dict(), folder / "a.pt")
    whole = (folder / "a.pt").read_bytes()
    (folder / "a.pt").write_bytes(whole.replace(b"PK\1\2", b"PK\1\3"))
    return folder / "a.pt"


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
    "half of a pt": (half(".pt"), "got one that is damaged or another"),
    "a pt without its directory": (torn, r"damaged or another \(BadZipFile\). Fetch the file ag"),
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
    "metadata that is a list": (raw({"__metadata__": []}), "strings, got metadata='list'"),
    "metadata that is null": (raw({"__metadata__": None}), "strings, got metadata='NoneType'"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16")), "must hold JSON, got"),
    "UTF-16 without a mark": (raw('{"a": 1}'.encode("utf-16-le")), "must hold JSON, got"),
    "UTF-8 with a mark": (raw(b"\xef\xbb\xbf{}"), "must hold JSON, got"),
    "an index of PyTorch's": (
        text("pytorch_model.bin.index.json", "{}"),
        "got one of PyTorch's files, which is not supported",
    ),
    "an unknown dtype": (raw({"a": entry(dtype="F4")}, b"\0" * 8), "must hold a dtype in BOOL, "),
    "the wrong dtype": (raw({"a": entry(dtype="F64")}, b"\0" * 8), "as the tensor has bytes, 16"),
    "a negative size": (raw({"a": entry(shape=[-2])}, b"\0" * 8), "two offsets"),
    "a fraction": (raw({"a": entry(shape=[2.0])}, b"\0" * 8), "two offsets"),
    "a size of true": (raw({"a": entry(shape=[True])}, b"\0" * 8), "two offsets"),
    "an absurd size": (raw({"a": entry(shape=[0, 2**70])}, b"\0" * 8), "two offsets"),
    "huge sizes beside none": (
        raw({"a": entry(shape=[2**47, 2**47, 0], data_offsets=[0, 0])}),
        r"must have sizes that a file can have, got tensor='a' and shape=\[1407",
    ),
    "huge sizes": (raw({"a": entry(shape=[2**40] * 9)}, b"\0" * 8), "sizes that a file can"),
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
    if path.suffix in (".safetensors", ".json", "") and "bin" not in path.name:
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


def test_any_changed_byte_of_a_pt_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.pt", np.random.default_rng(0)
    torch.save({"a": torch.ones(3)}, path)
    whole, said = path.read_bytes(), []
    for place in [*rng.integers(0, len(whole), 200), *range(len(whole) - 400, len(whole), 2)]:
        changed = bytearray(whole)
        changed[place] ^= rng.integers(1, 256)
        path.write_bytes(changed)
        try:
            interop.read_tensors(path)
        except ValueError as refused:
            said.append(str(refused))
    assert sum("damaged" in words for words in said) > 50
    assert not any("\n" in words or "a.pt" not in words for words in said)


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


def test_a_key_is_refused_for_safetensors(tmp_path: Path) -> None:
    path = interop.save_safetensors(Two(), tmp_path / "a.safetensors")
    index = interop.save_safetensors(Two(), tmp_path / "b.safetensors", max_shard_size=60)
    for place in (path, index):
        with pytest.raises(ValueError, match="key must be None for safetensors"):
            interop.read_tensors(place, key="model")


def test_a_missing_torch_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch_two().state_dict(), tmp_path / "a.pt")
    path = interop.save_safetensors(Two(), tmp_path / "a.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'flaxstab\[torch\]'"):
        interop.read_tensors(tmp_path / "a.pt")
    assert interop.load_safetensors(Two(), path).complete  # needs none
