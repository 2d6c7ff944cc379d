"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from flaxstab._files import write_whole


def test_a_file_is_written_where_it_was_named(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    assert write_whole(place, lambda path: path.write_text("new")) == place
    assert place.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    place.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(place, fail)
    assert place.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    place = write_whole(tmp_path / "whole", lambda path: path.write_text("x"))
    assert place.stat().st_mode == (tmp_path / "plain").stat().st_mode
    os.chmod(place, 0o600)
    write_whole(place, lambda path: path.write_text("y"))
    assert place.stat().st_mode & 0o777 == 0o600


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a file must be named in a folder that exists"):
        write_whole(tmp_path / "none" / "a", lambda path: path.touch())
    with pytest.raises(ValueError, match="a file must be named in a folder that exists"):
        write_whole(tmp_path, lambda path: path.touch())
