"""What an environment is said to be, and what is known to be wrong with it."""

import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxstab
from flaxstab import _environment
from flaxstab._environment import _devices, _known, _versions
from parity_tests.support.absent import needs_torch

# Every pair that was installed and tried on Python 3.13 (jax and flax from PyPI; ``from flax import
# nnx``, then one jitted nnx.Linear): what ran, and what could not be imported.
TRIED = {
    "0.6.2": ("0.10.7 0.11.2 0.12.0", "0.12.1 0.12.4 0.12.6 0.12.8"),
    "0.7.2": ("0.10.7 0.11.2 0.12.0", "0.12.1 0.12.4 0.12.6 0.12.8"),
    "0.8.0": ("0.11.2 0.12.0", "0.10.7 0.12.1 0.12.2 0.12.3 0.12.4 0.12.5 0.12.6 0.12.8"),
    "0.8.1": ("0.11.2 0.12.0 0.12.1 0.12.2 0.12.3 0.12.4 0.12.5 0.12.6", "0.10.7 0.12.8"),
    "0.8.2": ("0.12.2 0.12.3 0.12.4 0.12.5 0.12.6", "0.10.7 0.11.2 0.12.0 0.12.1 0.12.8"),
    "0.8.3": ("0.12.4 0.12.6", "0.10.7 0.11.2 0.12.0 0.12.1 0.12.8"),
    "0.9.0": ("0.12.2 0.12.3 0.12.4 0.12.5 0.12.6", "0.10.7 0.11.2 0.12.0 0.12.1 0.12.8"),
    "0.9.1": ("0.12.2 0.12.3 0.12.4 0.12.5 0.12.6", "0.10.7 0.11.2 0.12.0 0.12.1 0.12.8"),
    "0.9.2": ("0.12.4 0.12.6", "0.10.7 0.11.2 0.12.0 0.12.1 0.12.8"),
    "0.10.0": ("0.12.7 0.12.8 0.12.9 0.12.10 0.12.12", ""),
    "0.10.1": ("0.12.7 0.12.8 0.12.9 0.12.10 0.12.12", ""),
    "0.10.2": (
        "0.12.4 0.12.6 0.12.7 0.12.8 0.12.9 0.12.10 0.12.12", "0.10.7 0.11.2 0.12.0 0.12.1",
    ),
    "0.11.0": (
        "0.12.7 0.12.8 0.12.9 0.12.10 0.12.12",
        "0.10.7 0.11.2 0.12.0 0.12.1 0.12.2 0.12.3 0.12.4 0.12.5 0.12.6",
    ),
    "0.11.1": (
        "0.12.9 0.12.10 0.12.12",
        "0.10.7 0.11.2 0.12.0 0.12.1 0.12.2 0.12.3 0.12.4 0.12.5 0.12.6 0.12.7 0.12.8",
    ),
    "0.11.2": ("0.12.10 0.12.12", "0.12.7 0.12.8 0.12.9"),
    "0.12.0": ("0.12.10 0.12.12", "0.12.7 0.12.8 0.12.9"),
    "0.12.0.1": (
        "0.12.10 0.12.12",
        "0.10.7 0.11.2 0.12.0 0.12.1 0.12.4 0.12.6 0.12.7 0.12.8 0.12.9",
    ),
}  # fmt: skip
HERE = {"packages": {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "numpy": "2.4.6"}}


def test_describing_imports_no_framework() -> None:
    code = (
        "import sys; from flaxstab._environment import describe; describe();"
        "print({'jax', 'jaxlib', 'flax', 'optax', 'torch', 'numpy'} & set(sys.modules))"
    )
    call = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout == "set()\n"  # noqa: S603


def test_versions_python_and_settings_are_those_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    monkeypatch.setenv("NNX_GRAPH_MODE", "false")
    monkeypatch.setenv("HOME_PAGE", "not of interest")
    described = _environment.describe()
    assert described["packages"]["jax"] == jax.__version__
    assert described["packages"]["numpy"] == metadata.version("numpy")
    assert described["packages"]["flaxstab"] == flaxstab.__version__
    assert described["python"]["version"] == platform.python_version()
    assert described["settings"]["XLA_FLAGS"] == "--xla_dump_to=/nowhere"
    assert described["settings"]["NNX_GRAPH_MODE"] == "false"
    assert "HOME_PAGE" not in described["settings"]


@needs_torch
def test_devices_flags_and_precision_are_described_in_json() -> None:
    described = json.loads(json.dumps(_environment.describe(devices=True)))
    assert set(described["imports"]) == {"numpy", "jax", "flax", "optax", "torch"}
    assert set(described["imports"].values()) == {""}
    assert len(described["jax"]["devices"]) == len(jax.devices())
    assert described["jax"]["flags"]["jax_numpy_rank_promotion"] == "raise"
    for side in ("jax", "torch"):
        assert described[side]["matmul"] == {"bits": 23, "name": "float32"}
        assert described[side]["convolution"] == {"bits": 23, "name": "float32"}


@pytest.mark.parametrize(
    ("bits", "name"), [(23, "float32"), (10, "tf32"), (7, "bfloat16"), (16, "between")]
)
def test_the_precision_of_a_product_is_measured(bits: int, name: str) -> None:
    """Operands rounded to so many bits of mantissa, to nearest even, as the matrix units do."""

    def rounded(x: np.ndarray) -> np.ndarray:
        mantissa, exponent = np.frexp(x.astype(np.float64))
        return np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (rounded(a) @ rounded(b)).astype(np.float32)

    def convolution(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        centre = rounded(kernel)[:, :, 1, 1]
        return np.einsum("oc,nchw->nohw", centre, rounded(image)).astype(np.float32)

    assert _devices.precision(_devices._bits_of_product(product)) == {"bits": bits, "name": name}
    assert _devices.precision(_devices._bits_of_convolution(convolution))["bits"] == bits


def test_jax_in_a_lower_precision_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)).astype(jnp.float32)

    monkeypatch.setattr(jnp, "matmul", product)
    found = _devices._jax()
    assert found["matmul"]["name"] == "bfloat16"
    (told,) = (
        each for each in _environment.findings({**HERE, "jax": found}) if "matmul" in each.what
    )
    assert told.what == "a float32 matmul is computed in bfloat16 by JAX."
    assert "highest" in told.fix


def test_a_module_that_fails_to_import_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise AttributeError(f"{name}\n  is broken")

    monkeypatch.setattr(_devices, "import_module", broken)
    found = _devices.probe()
    assert found["imports"]["flax"] == "AttributeError: flax.nnx is broken"
    assert (found["jax"], found["torch"]) == ({}, {})


def test_versions_are_ordered_as_packaging_orders_them() -> None:
    packaging = pytest.importorskip("packaging.version")
    words = (
        "0.9 0.10.0.dev3 0.10.0a1 0.10.0b2 0.10.0rc1 0.10 0.10.0.1 0.10.2 0.12.0 0.12.0.1 0.12.10"
    )
    for low, high in pairwise(words.split()):
        assert packaging.Version(low) < packaging.Version(high)
        assert _versions.key(low) < _versions.key(high)
    assert _versions.key("0.10") == _versions.key("0.10.0") == _versions.key("0.10.0+cpu")


@pytest.mark.parametrize(
    "words",
    ["", "jax=0.10", "jax>=0.10", "jax==", "jax @ https://x", "-e .", "--pre", "jax==0.10;x",
     "jax[cuda]", "../jax", "jax==0.10 $(x)", "jax,jax==1", "jax==abc"],
)  # fmt: skip
def test_what_is_no_list_of_versions_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"(must be|got)"):
        _versions.parse_pins(words)


def test_versions_are_read_in_any_spelling() -> None:
    pins = _versions.parse_pins(" jax == 0.11.1,Flax==0.12.8  ml_dtypes")
    assert pins == {"jax": "0.11.1", "flax": "0.12.8", "ml-dtypes": ""}


def test_known_bad_pairs_are_those_that_were_tried_and_failed() -> None:
    wrong = [
        (old, flax)
        for old, (ran, failed) in TRIED.items()
        for flaxes, bad in ((ran, False), (failed, True))
        for flax in flaxes.split()
        if bool(_environment.bad_pairs({"jax": old, "flax": flax})) is not bad
    ]
    assert wrong == []
    assert sum(len(f"{ran} {failed}".split()) for ran, failed in TRIED.values()) == 148


def test_the_page_on_upgrades_shows_the_pairs_that_were_tried() -> None:
    page = Path(__file__).parents[1] / "docs" / "upgrades.md"
    if not page.is_file():
        pytest.skip("the docs are not part of the wheel")
    rows = re.findall(r"^\| (\d[\d.]*) \| (.+) \| (.+) \|$", page.read_text("utf-8"), re.MULTILINE)
    words = [[cell.replace(",", "").strip("–") for cell in row] for row in rows]  # noqa: RUF001
    shown = {jax: (ran, failed) for jax, ran, failed in words}
    assert shown == TRIED


def test_each_bad_pair_names_one_cause_and_a_way_out_that_was_tried() -> None:
    for jax_version, (_, failed) in TRIED.items():
        for flax in failed.split():
            (found,) = _environment.bad_pairs({"jax": jax_version, "flax": flax})
            assert re.search(r"(jax|flax)[<>]", found.install)
    assert _environment.bad_pairs({"jax": "0.11.1", "flax": None}) == ()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"jax": "0.4.38"}, {"jax": "0.5.0"}, ["0.5.0 stream"]),
        ({"jax": "0.5.0"}, {"jax": "0.4.38"}, ["0.5.0 stream"]),
        ({"jax": "0.6.2"}, {"jax": "0.7.1"}, ["0.7.0 numeric", "0.7.0 crash"]),
        ({"jax": "0.6.2"}, {"jax": "0.7.2"}, ["0.7.0 numeric", "0.7.2 stream"]),
        ({"jax": "0.10.0"}, {"jax": "0.10.2"}, []),
        ({"flax": "0.12.7"}, {"flax": "0.12.8"}, []),
        ({"torch": "2.5.1"}, {"torch": "2.6.0+cpu"}, ["2.6.0 API"]),
        ({"torch": "2.5.1"}, {}, []),
    ],
)
def test_incidents_between_two_versions(
    before: dict[str, str], after: dict[str, str], told: list[str]
) -> None:
    found = _environment.incidents(before, after)
    assert [f"{each.version} {each.kind}" for each in found] == told


def test_faults_are_told_to_those_who_have_the_version() -> None:
    assert [each.kind for each in _environment.standing({"jax": "0.7.1"})] == ["crash"]
    assert _environment.standing({"jax": "0.7.2"}) == ()
    assert [each.version for each in _environment.standing({"flax": "0.12.8"})] == ["0.12.1"]
    assert {each.version for each in _environment.ahead({"flax": "0.12.8"})} == {
        "0.12.9",
        "0.12.12",
    }


def test_the_table_of_incidents_is_sound() -> None:
    for known in _known.INCIDENTS:
        assert known.reference
        assert known.what.endswith(".")
        assert not known.until or _versions.key(known.version) < _versions.key(known.until)
    for package in ("jax", "flax"):
        versions = [known.version for known in _known.INCIDENTS if known.package == package]
        assert versions == sorted(versions, key=_versions.key)


@pytest.mark.parametrize(
    ("changes", "level", "what"),
    [
        ({"packages": {**HERE["packages"], "jax": "0.11.1"}}, "bad", "MutableHiType"),
        ({"packages": {**HERE["packages"], "flax": "0.12.6"}}, "bad", "needs flax>=0.12.7"),
        ({"packages": {**HERE["packages"], "optax": None}}, "bad", "optax is not installed"),
        ({}, "note", "torch is not installed"),
        ({"imports": {"flax": "ImportError: x"}}, "bad", "flax 0.12.8 is installed and cannot be"),
        ({"jax": {"error": "RuntimeError: no device"}}, "bad", "jax cannot compute here"),
        ({"jax": {"backend": "gpu"}}, "note", "may differ from run to run"),
        ({"jax": {"matmul": {"name": "tf32"}}, "torch": {"matmul": {"name": "float32"}}}, "note",
         "in tf32 by JAX and in float32 by torch"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(changes: dict[str, object], level: str, what: str) -> None:
    found = [each for each in _environment.findings({**HERE, **changes}) if what in each.what]
    assert [each.level for each in found] == [level]


def test_a_sound_environment_has_no_finding() -> None:
    sound = {"matmul": {"name": "float32"}, "convolution": {"name": "float32"}, "backend": "cpu"}
    packages = {**HERE["packages"], "flax": "0.12.8", "torch": "2.13.0+cpu"}
    described = {"packages": packages, "jax": sound, "torch": sound, "imports": {"jax": ""}}
    assert [
        each.what for each in _environment.findings(described) if "BatchNorm" not in each.what
    ] == []
