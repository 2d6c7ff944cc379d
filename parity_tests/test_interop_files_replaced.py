"""Weights saved again by the same name: what a folder holds is what was saved last."""

from pathlib import Path

import pytest

from flaxstab import interop
from parity_tests.test_interop_files import Two, bits

PIECES = {"one": None, "two": 60, "four": 1}


def sizes(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("later", PIECES)
@pytest.mark.parametrize("earlier", PIECES)
def test_a_folder_has_what_was_saved_last(earlier: str, later: str, tmp_path: Path) -> None:
    path, apart = tmp_path / "m.safetensors", tmp_path / "apart"
    apart.mkdir()
    interop.save_safetensors(Two(1), path, max_shard_size=PIECES[earlier])
    saved = interop.save_safetensors(Two(2), path, max_shard_size=PIECES[later])
    expected = interop.state_dict(Two(2))
    for place in (tmp_path, saved):
        found = interop.read_tensors(place)
        assert {n: bits(a) for n, a in found.items()} == {n: bits(a) for n, a in expected.items()}
    interop.save_safetensors(Two(2), apart / "m.safetensors", max_shard_size=PIECES[later])
    assert sizes(tmp_path) == sorted(["apart", *sizes(apart)])


def test_files_of_another_name_stay(tmp_path: Path) -> None:
    interop.save_safetensors(Two(1), tmp_path / "m.safetensors", max_shard_size=60)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "other.safetensors", "b": "../x.safetensors"}}')
    (tmp_path / "other.safetensors").write_text("kept")
    interop.save_safetensors(Two(2), tmp_path / "m.safetensors")
    assert not index.exists()
    assert (tmp_path / "other.safetensors").read_text() == "kept"
