"""``flaxstab env``: what it says, also where a framework cannot be imported, and how it exits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flaxstab import cli
from flaxstab._environment import _describe
from parity_tests.support.absent import needs_torch
from parity_tests.test_cli import ROOT, run

SOUND = {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "numpy": "2.4.6", "torch": "2.13.0"}


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Makes the packages look installed in these versions."""
    monkeypatch.setattr(_describe, "version_of", {**SOUND, **versions}.get)


def package(folder: Path, name: str, version: str, code: str) -> None:
    """Installs a package of one file into a folder."""
    module = folder / name / "__init__.py"
    module.parent.mkdir()
    module.write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_help_needs_no_framework() -> None:
    ended = run(["env", "--help"], "jax", "jaxlib", "flax", "optax", "torch", "numpy", "rich")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "what is known to be wrong" in " ".join(ended.stdout.split())


@needs_torch
def test_a_sound_environment_is_shown_with_what_is_known_ahead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    assert cli.main(["env"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "float32 matmul: float32 (23 bits of mantissa, measured)" in said.out
    assert "jax_enable_x64" in said.out
    assert "WRONG" not in said.out
    assert "jax 0.11.2 [import] flax.nnx of flax<0.12.10 cannot be imported." in said.out


def test_json_holds_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, flax="0.12.6", jax="0.11.1")
    assert cli.main(["env", "--quick", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == 1
    assert data["packages"]["jax"] == "0.11.1"
    assert [found["level"] for found in data["findings"]][:2] == ["bad", "bad"]
    assert {found["version"] for found in data["ahead"]} >= {"0.11.2", "0.12.12"}
    assert not {"jax", "imports"} & set(data)


def test_every_framework_blocked_is_explained_not_raised() -> None:
    ended = run(["env"], "jax", "jaxlib", "flax", "optax", "torch", "numpy", "rich")
    assert (ended.returncode, ended.stderr) == (1, "")
    told = " ".join(ended.stdout.split())
    for name in ("numpy", "jax", "flax", "optax"):
        assert f"{name} {_describe.version_of(name)} is installed and cannot be imported" in told
    assert "It needs numpy, which cannot be imported either: mend that first." in told
    assert "pip install --force-reinstall numpy" in told


def test_a_pair_that_cannot_be_imported_is_explained_with_what_to_install(tmp_path: Path) -> None:
    package(tmp_path, "jax", "0.11.1", "raise ImportError('a stand-in')")
    package(
        tmp_path, "flax", "0.12.8",
        "raise AttributeError('jax.experimental.hijax has no attribute MutableHiType')",
    )  # fmt: skip
    package(tmp_path, "torch", "2.13.0", "raise OSError('libtorch.so: cannot open shared object')")
    places = os.pathsep.join([str(tmp_path), str(ROOT)])
    call = [sys.executable, "-W", "error", "-c",
            "import sys; from flaxstab.cli import main; sys.exit(main(['env']))"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": places}
    ended = subprocess.run(call, capture_output=True, text=True, check=False, env=env)  # noqa: S603
    assert (ended.returncode, ended.stderr) == (1, "")
    told = " ".join(ended.stdout.split())
    assert "WRONG: jax 0.11.1 and flax 0.12.8 cannot be used together" in told
    assert "Install flax>=0.12.10 (needs Python 3.12 or newer), or jax<0.11.1." in told
    assert "marimo-team/marimo#10646" in told
    assert "torch 2.13.0 is installed and cannot be imported: OSError: libtorch.so" in told


def test_what_changed_since_some_versions_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["env", "--from", "jax==0.4.30,flax==0.12.0", "--to", "jax==0.10.2,flax==0.12.8"]
    assert cli.main(call) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("flax 0.12.0 -> 0.12.8, jax 0.4.30 -> 0.10.2\n")
    assert "jax 0.5.0 [stream]" in shown
    assert "flax 0.12.7 [API]" in shown
    assert "jax 0.11" not in shown


def test_the_installed_versions_are_the_other_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch)
    assert cli.main(["env", "--to", "flax==0.12.12", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["incidents"]
    assert [found["version"] for found in told] == ["0.12.9", "0.12.12"]
    assert cli.main(["env", "--from", "flax==0.12.7"]) == 0
    assert "Nothing is known to have changed" in capsys.readouterr().out


def test_a_downgrade_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["env", "--from", "jax==0.6.0,flax==0.12.0", "--to", "jax==0.4.30,flax==0.12.8"]
    assert cli.main(call) == 0
    _, second, *rest = capsys.readouterr().out.splitlines()
    assert second == "A downgrade of jax: its changes below are undone."
    assert any("jax 0.5.0 [stream]" in line for line in rest)
    assert cli.main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["downgrades"] == ["jax"]


def test_a_package_of_which_nothing_is_known_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["env", "--to", "banana==1"]) == 2
    assert "jax, jaxlib, flax" in (said := capsys.readouterr().err)
    assert said.endswith("got 'banana'.\n")
    assert cli.main(["env", "--from", "ml-dtypes==0.0.1"]) == 0
    assert capsys.readouterr().out.startswith("ml_dtypes 0.0.1 -> ")


@pytest.mark.parametrize("words", ["jax", "jax>=0.4", "jax==x", "jax==0.4;rm", "banana==1"])
def test_what_is_no_version_is_refused_in_one_line(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["env", "--from", words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
