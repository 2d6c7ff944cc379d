"""Baseline files: what goes in comes out; nothing in a file is trusted; never half-written."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flaxstab import functional, linear, parity
from flaxstab.parity._record import Baseline, Record, read_baseline, write_baseline
from flaxstab.parity._record import _baseline as baselines
from flaxstab.parity._record import _bundle as bundles
from flaxstab.parity._record._take import COPIED, take
from flaxstab.parity._replay import drawn_by
from parity_tests.support.baselines import baseline, record, with_facts

X = np.random.default_rng(0).normal(0.5, 1.0, (4, 3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_baseline(baseline(layer=record(), other=record()), tmp_path / "a.parity")


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Rewrites a file's members."""
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return file


def of_manifest(change: Callable[[dict], object]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        held = json.loads(members["manifest.json"])
        change(held)
        members["manifest.json"] = json.dumps(held).encode()

    return apply


def first_entry(held: dict) -> dict:
    return held["cases"][0]["bundles"][0]["entries"][0]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


MEMBER = "cases/0/jax float64/float64.npy"


def replaced(content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({MEMBER: content})


def test_all_dtypes_shapes_and_bits_come_back(tmp_path: Path) -> None:
    arrays = {
        "nan": np.array([np.nan, -0.0, np.inf, 1e-310]),
        "bfloat16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "float16": np.ones((2, 1, 2), np.float16),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False]),
        "int": np.arange(3),
        "big": np.arange(3, dtype=">f8"),
    }
    made = baseline(layer=record()._replace(inputs=arrays))
    found = read_baseline(write_baseline(made, tmp_path / "a.parity"))
    for name, array in arrays.items():
        got = found.cases["layer"].inputs[name]
        assert (got.dtype.name, got.shape) == (np.asarray(array).dtype.name, np.shape(array))
        plain = np.asarray(array).astype(got.dtype)  # in this machine's byte order
        assert got.tobytes() == plain.tobytes()
    assert found.cases["layer"].facts == made.cases["layer"].facts
    assert (found.surface, found.environment) == (made.surface, made.environment)


def test_equal_baselines_are_equal_files(file: Path, tmp_path: Path) -> None:
    again = write_baseline(read_baseline(file), tmp_path / "b.parity")
    assert again.read_bytes() == file.read_bytes()


class Bomb:
    """What a pickle must not be able to do: it leaves a mark where it runs."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.mark, "w")


def test_a_pickle_is_refused_and_never_run(file: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = npy(np.array([Bomb(str(mark))] * 36, object))
    for planted in (content, pickle.dumps(Bomb(str(mark)))):
        with pytest.raises(ValueError, match=r"float64\.npy must"):
            read_baseline(rewritten(file, replaced(planted)))
        assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced(npy(np.zeros(36, np.float32))), "must hold 36 elements of float64"),
        (replaced(npy(np.zeros((6, 6)))), r"shape \(36,\)"),
        (replaced(npy(np.zeros(35))), r"got .* \(35,\)"),
        (replaced(b"\x93NUMPY" + b"x" * 400), "36 elements|must be an array"),
        (lambda members: members.pop(MEMBER), "must be in the file, got none"),
        (lambda members: members.pop("manifest.json"), "manifest.json must be in the file"),
        (of_manifest(lambda held: held.update(format="other")), "must be of format"),
        (of_manifest(lambda held: held.update(schema=2)), "newer flaxstab wrote"),
        (of_manifest(lambda held: held.update(schema="1")), "schema must be an integer"),
        (of_manifest(lambda held: held.pop("cases")), "cases"),
        (of_manifest(lambda held: held["cases"].append(held["cases"][0])), "twice"),
        (
            of_manifest(lambda held: first_entry(held).update(shape=[-1])),
            "negative",
        ),
        (
            of_manifest(lambda held: first_entry(held).update(shape="x")),
            "shape must be a list",
        ),
        (
            of_manifest(lambda held: held["cases"][0]["facts"].update(kind="virus")),
            r"cases\[0\].facts.kind must be one of",
        ),
        (lambda members: members.update({"manifest.json": b"[" * 100_000}), "must be JSON"),
    ],
)  # fmt: skip
def test_a_foreign_file_is_refused_with_the_place_and_the_fix(
    file: Path, change: Callable[[dict[str, bytes]], None], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        read_baseline(rewritten(file, change))
    said = str(refused.value)
    assert said.startswith("a.parity must be a baseline: ")
    assert said.endswith("or name another file.")
    assert "\n" not in said


@pytest.mark.parametrize("kept", [0, 1, 100, 2000])
def test_a_truncated_file_is_refused(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="no whole zip file"):
        read_baseline(file)


def test_a_damaged_member_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = content.index(b"jax float64") + 60
    content[middle : middle + 40] = bytes(40)
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="must be a baseline"):
        read_baseline(file)


def test_members_that_would_fill_the_memory_are_refused_unread(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "LARGEST", 1 << 20)
    bomb = rewritten(file, lambda members: members.update({"zeros": bytes(1 << 21)}))
    assert bomb.stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="must take 1048576 bytes at most"):
        read_baseline(bomb)


def test_a_member_cannot_claim_more_than_it_has(file: Path) -> None:
    def claim(held: dict) -> None:
        first_entry(held)["shape"] = [1 << 20]

    with pytest.raises(ValueError, match="must hold 1048576 elements"):
        read_baseline(rewritten(file, of_manifest(claim)))


def test_a_file_is_whole_or_not_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(baselines, "write_member", fails)
    with pytest.raises(OSError, match="full"):
        write_baseline(baseline(), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_units_must_fit_their_values(file: Path) -> None:
    made = baseline(layer=record()._replace(units={"float64": {"output": np.zeros(7)}}))
    write_baseline(made, file)
    with pytest.raises(ValueError, match="unit of the shape of 'output'"):
        read_baseline(file)


def test_a_dtype_that_npy_does_not_know_is_refused(tmp_path: Path) -> None:
    made = baseline(layer=record()._replace(inputs={"input 0": np.zeros(2, complex)}))
    with pytest.raises(ValueError, match="'input 0' of complex128"):
        write_baseline(made, tmp_path / "a.parity")
    assert not [*tmp_path.iterdir()]


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def pairs() -> dict[str, parity.Subject]:
    flax_model = linear.Linear(3, 2, rngs=nnx.Rngs(0))
    wrong = parity.Subject(flax_model, torch.nn.Linear(4, 2), (X,))
    return {
        "linear": parity.Subject(flax_model, torch.nn.Linear(3, 2), (X,)),
        "gelu": parity.Subject(functional.gelu, torch.nn.functional.gelu, (X,)),
        "sgd": parity.Subject(optax.sgd(0.1), sgd, (X,)),
        "wrong": wrong,
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "before.parity"
    parity.record(path, pairs())
    return path


def test_record_keeps_what_both_sides_computed(recorded: Path) -> None:
    found = parity.read_baseline(recorded)
    case = found.cases["linear"]
    assert case.facts.passed
    assert {*case.values} == {f"{s} {p}" for s in ("jax", "torch") for p in ("float64", "float32")}
    expected = {"output", "evaluation", "grad input 0", "grad weight", "grad bias"}
    assert expected <= case.values["jax float64"].keys()
    weight, bias = (case.weights[n].astype(np.float64) for n in ("weight", "bias"))
    output = X.astype(np.float32).astype(np.float64) @ weight.T + bias
    for side in ("jax", "torch"):
        np.testing.assert_allclose(case.values[f"{side} float64"]["output"], output, rtol=1e-14)
    assert {"step 1 param 0", "step 10 update 0"} <= found.cases["sgd"].values["jax float64"].keys()
    assert found.cases["wrong"].facts.kind == "none"
    assert "weights must fit" in found.cases["wrong"].facts.error
    assert "torch.nn.LayerNorm" in {s.name for s in found.surface}
    assert {"jax.random.normal", "torch.randn", "nnx.Dropout"} <= found.streams.keys()
    assert not found.failures
    assert found.environment["packages"]["torch"]


def test_inputs_and_weights_are_those_stored_not_what_a_seed_draws(
    recorded: Path, tmp_path: Path
) -> None:
    # torch.nn.Linear is drawn anew, and the inputs are others.
    other = {n: s._replace(inputs=(X + 1,)) for n, s in pairs().items() if n in ("linear", "gelu")}
    plain = parity.record(tmp_path / "plain.parity", other)
    with pytest.raises(ValueError, match="from equal inputs and weights"):
        parity.diff(recorded, plain)
    again = parity.record(tmp_path / "again.parity", other, inputs_from=recorded)
    found = parity.diff(recorded, again)
    effects = {case.name: str(case.effect) for case in found.cases}
    assert (effects["linear"], effects["gelu"]) == ("same", "same")


def test_a_later_fault_on_one_side_is_found_by_the_files(recorded: Path, tmp_path: Path) -> None:
    faulty = parity.Subject(lambda x: functional.gelu(x) * 1.001, torch.nn.functional.gelu, (X,))
    new = parity.record(tmp_path / "new.parity", {"gelu": faulty}, inputs_from=recorded)
    found = parity.diff(recorded, new)
    assert found.verdict is parity.Outcome.BREAKS
    assert (found.cases[0].name, found.cases[0].mover) == ("gelu", "jax")


def test_large_weights_are_kept_as_hashes_with_their_path() -> None:
    size = COPIED // 4 + 1
    wide = torch.nn.Linear(1, size, bias=False)
    flax_model = linear.Linear(1, size, bias=False, rngs=nnx.Rngs(0))
    options = {"dtypes": (), "weights_file": "big.safetensors"}
    subject = parity.Subject(flax_model, wide, (X[:2, :1],), **options)
    _, made = take(subject)
    assert made.weights == {}
    assert made.facts.source == "big.safetensors"
    assert "weights weight" in {mark.name for mark in made.facts.hashes}
    kept = sum(a.nbytes for group in made.values.values() for a in group.values())
    assert kept < COPIED
    other = subject._replace(torch_side=torch.nn.Linear(1, size, bias=False))
    with pytest.raises(ValueError, match=r"'weight' \(they came from 'big.safetensors'\)"):
        take(other, made)


def test_the_draws_of_a_model_tell_its_stream() -> None:
    def draws(seed: int) -> dict[str, np.ndarray]:
        return drawn_by(nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(seed)), nnx.relu))

    first, again, other = draws(0), draws(0), draws(1)
    (name,) = first
    np.testing.assert_array_equal(first[name], again[name])
    assert (first[name] != other[name]).any()


def test_what_is_no_subject_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="subjects must be a dict of"):
        parity.record(tmp_path / "a", {"gelu": (functional.gelu, torch.relu)})
    with pytest.raises(ValueError, match="folder must exist"):
        parity.record(tmp_path / "none" / "a", {})
    for none in ({}, [*pairs().values()][:1], None):
        with pytest.raises(ValueError, match=r"a dict of parity\.Subject by name, got subj"):
            parity.record(tmp_path / "a", none)


def test_a_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    ran: list[object] = []
    subject = parity.Subject(ran.append, ran.append, (X,))
    with pytest.raises(ValueError, match="must be a file, not a folder, got path="):
        parity.record(tmp_path, {"a": subject})
    assert not ran


def test_a_record_without_values_has_not_passed() -> None:
    made = with_facts(Record(record().facts), kind="none", error="it does not run")
    assert not made.facts.passed
    assert isinstance(baseline(layer=made), Baseline)
