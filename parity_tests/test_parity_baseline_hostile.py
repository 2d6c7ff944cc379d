"""Baseline files made to do harm: each is refused when it is read, in one line, by name."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flaxstab import cli
from flaxstab.parity._record import _bundle as bundles
from flaxstab.parity._record import read_baseline, write_baseline
from parity_tests.support.baselines import baseline, record
from parity_tests.test_parity_baseline import first_entry, of_manifest, rewritten

HUGE = 10**400


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_baseline(baseline(layer=record(), other=record()), tmp_path / "a.parity")


def refused(file: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        read_baseline(file)
    assert str(error.value).startswith("a.parity must be a baseline: ")
    assert "\n" not in str(error.value)


def without(group: str) -> Callable[[dict], None]:
    def change(held: dict) -> None:
        case = held["cases"][0]
        case["bundles"] = [b for b in case["bundles"] if not b["name"].endswith(f"/{group}")]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda held: held["cases"][0]["facts"]["errors"][0].update(jax=HUGE),
            r"errors\[0\]\.jax must be a number that a float64 can hold",
        ),
        (lambda held: first_entry(held).update(shape=[0, HUGE]), "sizes from 0 to"),
        (lambda held: first_entry(held).update(shape=[1 << 29, 1 << 29]), "ask for .* at most"),
        (lambda held: first_entry(held).update(shape=[1] * 99), "32 axes at most, got 99"),
        (without("torch float64"), "'layer' must hold torch's values in float64, got none"),
        (without("jax float32"), "'layer' must hold jax's values in float32, got none"),
        (without("units float64"), "'layer' must hold units and values in float64, got none"),
    ],
)
def test_a_manifest_that_would_crash_the_reader_is_refused(
    file: Path, change: Callable[[dict], None], words: str
) -> None:
    refused(rewritten(file, of_manifest(change)), words)


def test_cases_that_share_a_member_are_refused_unread(file: Path) -> None:
    def share(held: dict) -> None:
        held["cases"][1]["bundles"] = held["cases"][0]["bundles"]

    refused(rewritten(file, of_manifest(share)), "names of their own, got 'cases/0/inputs' twice")


def test_what_the_manifest_asks_for_counts_not_only_what_is_there(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(file) as held:
        there = sum(info.file_size for info in held.infolist())
    monkeypatch.setattr(bundles, "LARGEST", there)
    read_baseline(file)
    change = of_manifest(lambda held: first_entry(held).update(shape=[there // 8 + 1500]))
    monkeypatch.setattr(bundles, "LARGEST", there + 8000)
    refused(rewritten(file, change), "must ask for .* bytes at most")


def test_an_encrypted_member_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = content.index(b"PK\x01\x02")  # the directory's first entry
    (flags,) = struct.unpack_from("<H", content, place + 8)
    struct.pack_into("<H", content, place + 8, flags | 1)
    file.write_bytes(bytes(content))
    refused(file, "must not be encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused(file: Path, method: int) -> None:
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", method) as new:
        for name, content in members.items():
            new.writestr(name, content)
    refused(file, f"must be stored or deflated, got method {method}")


def test_the_command_refuses_it_with_its_exit_code(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = write_baseline(baseline(layer=record()), tmp_path / "b.parity")
    bad = rewritten(file, of_manifest(without("units float64")))
    assert cli.main(["parity", "diff", str(bad), str(sound)]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), said.count("units and values in float64")) == (1, 1)
