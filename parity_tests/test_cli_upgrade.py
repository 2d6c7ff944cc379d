"""``flaxstab parity upgrade``: every way that it can end, with commands that are played."""

import json
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flaxstab import cli
from flaxstab._environment import Ended, InstallError, _isolated
from flaxstab.cli import _upgrade
from parity_tests.test_cli import ROOT, run
from parity_tests.test_cli_env import SOUND, pretend

PIP_HAS_NONE = """
ERROR: Ignored the following versions that require a different python version: 0.11.1 >=3.12
ERROR: Could not find a version that satisfies the requirement jax==0.11.1 (from versions: 0.10.2)
ERROR: No matching distribution found for jax==0.11.1
"""
BROKEN = "AttributeError: module 'jax.experimental.hijax' has no attribute 'MutableHiType'"
GOOD = Ended(0, "", "")


class Stage:
    """Plays the commands of an upgrade, each as it is told to end, and keeps what was called."""

    def __init__(self, folder: Path, **ends: Ended | list[Ended]) -> None:
        self.site = folder / "site"
        self.ends = ends
        self.calls: list[list[str]] = []
        self.versions = {**SOUND, "torch": None}
        self.imports = dict.fromkeys(("numpy", "jax", "flax", "optax"), "")
        self.verdict = "safe"
        self.names: list[dict[str, str]] = []

    def __call__(self, words: Sequence[str]) -> Ended:
        self.calls.append([*words])
        step = next(name for name in ("venv", "install", "-c", "env", "record", "diff") if name in words)  # fmt: skip # noqa: E501
        if step == "record":
            step = "after" if "-I" in words else "before"
        return getattr(self, f"_{step.lstrip('-')}")(words, self._end(step))

    def _end(self, step: str) -> Ended:
        end = self.ends.get(step, GOOD)
        return end.pop(0) if isinstance(end, list) else end

    def _venv(self, words: Sequence[str], ended: Ended) -> Ended:
        Path(words[-1]).mkdir()
        return ended

    def _install(self, words: Sequence[str], ended: Ended) -> Ended:
        self.constraints = Path(words[words.index("-c") + 1]).read_text().split()
        return ended

    def _c(self, _: Sequence[str], __: Ended) -> Ended:
        self.site.mkdir(exist_ok=True)
        return Ended(0, f"{self.site}\n", "")

    def _env(self, _: Sequence[str], ended: Ended) -> Ended:
        described = {"packages": self.versions, "imports": self.imports}
        return ended if ended.code < 0 else Ended(0, json.dumps(described), "")

    def _before(self, words: Sequence[str], ended: Ended) -> Ended:
        if ended.code in (0, 1):
            Path(words[words.index("record") + 1]).write_text("what was computed")
        return ended

    _after = _before

    def _diff(self, words: Sequence[str], ended: Ended) -> Ended:
        data = json.dumps(
            {"verdict": self.verdict, "headline": f"{self.verdict}: 57 cases", "names": self.names}
        )
        Path(words[words.index("--json") + 1]).write_text(data)
        return ended

    def called(self, *words: str) -> list[list[str]]:
        return [call for call in self.calls if {*words} <= {*call}]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Stage]:
    def play(**ends: Ended | list[Ended]) -> Stage:
        played = Stage(tmp_path, **ends)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(_upgrade, "call", played)
        here = {**SOUND, "torch": "2.13.0+cpu", "jaxlib": "0.10.2"}
        monkeypatch.setattr(_upgrade, "installed", lambda: here)
        pretend(monkeypatch)
        return played

    return play


def upgrade(*words: str) -> int:
    return cli.main(["parity", "upgrade", *words])


def test_help_needs_no_framework() -> None:
    ended = run(["parity", "upgrade", "--help"], "jax", "flax", "torch", "numpy", "pip")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1 it breaks; 2 refused" in " ".join(ended.stdout.split())


@pytest.mark.parametrize(
    ("verdict", "ended", "code"),
    [("safe", 0, 0), ("safe with changes", 0, 0), ("breaks", 1, 1)],
)
def test_both_are_recorded_and_compared(
    verdict: str, ended: int, code: int, stage: Callable[..., Stage], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    played = stage(diff=Ended(ended, "what moved, case by case\n", ""), after=Ended(1, "", ""))
    played.versions |= {"jax": "0.11.0"}
    played.verdict = verdict
    reports = tmp_path / "reports"
    assert upgrade("--to", "jax==0.11.0", "--report", str(reports), "--cases", "*norm*") == code
    said = capsys.readouterr()
    assert said.out.startswith(f"verdict: {verdict}: 57 cases\n")
    assert "jax        0.10.2 -> 0.11.0\n" in said.out
    assert "torch      2.13.0 (unchanged, not installed there)\n" in said.out
    assert "what moved, case by case\n" in said.out
    assert "jax 0.11.0 [numeric] jnp.empty" in said.out
    assert (reports / "upgrade.txt").read_text() == said.out
    (before,), (after,) = played.called(sys.executable, "record"), played.called("-I", "record")
    old, new = str(reports / "before.baseline"), str(reports / "after.baseline")
    assert before[-3:] == [old, "--cases", "*norm*"]
    assert after[-5:] == [new, "--cases", "*norm*", "--torch-from", old]
    assert played.called("diff", old, new)
    assert (played.site / "flaxstab" / "_files.py").is_file()
    assert not Path(played.called("venv")[0][-1]).exists()


def test_a_new_torch_computes_and_takes_the_same_inputs(stage: Callable[..., Stage]) -> None:
    played = stage()
    played.versions |= {"torch": "2.14.1"}
    played.imports |= {"torch": ""}
    assert upgrade("--to", "torch==2.14.1") == 0
    (after,) = played.called("-I", "record")
    assert after[-2] == "--inputs-from"
    assert "torch==2.14.1" in played.called("install")[0]


def test_names_that_changed_are_listed(
    stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    played = stage()
    played.names = [
        {"name": "jax.a", "change": "new", "words": "jax.a(x)"},
        {"name": "jax.b", "change": "parameter new", "words": "y=None is new"},
        {"name": "jax.c", "change": "parameter new", "words": "y=None is new"},
        {"name": "flaxstab.d", "change": "gone", "words": "it is no longer there"},
        {"name": "flax.e", "change": "gone", "words": "it is no longer there"},
    ]
    assert upgrade("--to", "jax==0.11.0") == 0
    shown = capsys.readouterr().out
    assert shown.endswith(
        "Public names that changed:\n"
        "  gone: it is no longer there: flax.e\n"
        "  parameter new: y=None is new: jax.b, jax.c\n"
        "  new: jax.a\n"
    )


def test_a_baseline_of_before_is_used_and_an_environment_kept(
    stage: Callable[..., Stage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "recorded"
    baseline.write_text("earlier")
    played = stage()
    assert upgrade("--to", "optax", "--baseline", str(baseline), "--keep") == 0
    assert played.called("record", sys.executable) == []
    assert played.called("diff", str(baseline))
    kept = Path(capsys.readouterr().err.rpartition("kept: ")[2].strip())
    assert kept.is_dir()
    assert "optax" in played.called("install")[0]


def test_versions_that_cannot_be_installed_are_a_result(
    stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    played = stage(install=Ended(1, "", PIP_HAS_NONE))
    assert upgrade("--to", "jax==0.11.1,flax==0.12.8") == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("verdict: breaks: cannot be installed: ")
    assert "No matching distribution found for jax==0.11.1" in first
    assert "give it with --python" in first
    told = " ".join(" ".join(rest).split())
    assert "Install flax>=0.12.10 (needs Python 3.12 or newer), or jax<0.11.1." in told
    assert len(played.called("install")) == 3


def test_a_pair_that_cannot_be_imported_is_a_result(
    stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    played = stage()
    played.versions |= {"jax": "0.11.1"}
    played.imports |= {"flax": BROKEN, "optax": ""}
    assert upgrade("--to", "jax==0.11.1,flax==0.12.8", "--python", "python3.13") == 1
    out = capsys.readouterr().out
    assert out.startswith(
        f"verdict: breaks: flax 0.12.8 cannot be imported with jax 0.11.1: {BROKEN}\n"
    )
    assert "jax 0.11.1 and flax 0.12.8 cannot be used together" in " ".join(out.split())
    assert "marimo-team/marimo#10646" in out
    assert played.called("record") == []
    assert played.called("venv")[0][0] == "python3.13"


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        (
            {"venv": Ended(127, "", "python3.99: No such file")},
            "cannot make an environment: python",
        ),
        ({"env": Ended(-11, "", "Fatal Python error")}, "frameworks are imported: signal 11."),
        ({"after": Ended(2, "", "flaxstab: no")}, "the cases cannot be run: flaxstab: no"),
        ({"after": Ended(-9, "", "")}, "the cases cannot be run: signal 9."),
    ],
)
def test_what_fails_in_the_other_environment_breaks(
    ends: dict[str, Ended], told: str, stage: Callable[..., Stage],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stage(**ends)
    assert upgrade("--to", "jax==0.11.0") == 1
    assert told in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    "ends",
    [{"before": Ended(2, "", "x")}, {"after": Ended(-15, "", "x")}, {"diff": Ended(2, "", "x")}],
)
def test_what_fails_here_is_refused(
    ends: dict[str, Ended], stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    stage(**ends)
    assert upgrade("--to", "jax==0.11.0") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].endswith(" x")


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "jax==0.10.2"], ["--to", "jax==0.10.2,torch==2.13.0"], ["--to", "jax>=0.11"],
        ["--to", "banana==1"], ["--to", "jax==0.11.0,banana"],
        ["--to", "--pre"], ["--to", "flaxstab==1.0"], ["--to", "jax; touch x"],
        ["--to", "jax==0.11.0", "--baseline", "/none"],
        ["--to", "jax==0.11.0", "--report", __file__],
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_refused_in_one_line(
    words: list[str], stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    played = stage()
    code = upgrade(f"--to={words[1]}", *words[2:])
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n"), played.calls) == (2, "", 1, [])


def test_packages_stay_as_they_are_as_far_as_they_go_together(stage: Callable[..., Stage]) -> None:
    played = stage(install=[Ended(1, "", "ERROR: ResolutionImpossible"), GOOD])
    assert upgrade("--to", "jax==0.11.0") == 0
    assert len(played.called("install")) == 2
    names = [line.partition("==")[0] for line in played.constraints]
    assert names == ["flax", "numpy", "optax", "torch"]
    assert "+" not in "".join(played.constraints)


def test_what_a_release_brings_with_it_is_free() -> None:
    here = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "flax": "0.12.8",
            "torch": "2.13.0+cu12", "nvidia-cudnn-cu12": "9", "jaxtyping": "0.3"}  # fmt: skip
    whole, frameworks, none = _isolated.attempts({"jax": "0.11.0"}, here)
    assert whole == ["flax==0.12.8", "jaxtyping==0.3", "nvidia-cudnn-cu12==9", "torch==2.13.0"]
    assert frameworks == ["flax==0.12.8", "torch==2.13.0"]
    assert none == []
    assert "nvidia-cudnn-cu12==9" not in _isolated.attempts({"torch": ""}, here)[0]
    wanted = _isolated.requirements({"jax": "0.11.0"}, here)
    assert wanted[:2] == ["jax[cuda12]==0.11.0", "flax"]
    assert "torch" not in wanted


def test_what_flaxstab_needs_is_installed() -> None:
    settings = ROOT / "pyproject.toml"
    if not settings.is_file():
        pytest.skip("pyproject.toml is not part of the wheel")
    needed = tomllib.loads(settings.read_text())["project"]["dependencies"]
    names = {need.partition(">")[0].replace("_", "-") for need in needed}
    assert names == {*_isolated.CORE}


def test_a_command_is_run_without_a_shell_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a/place/of/the/user")
    shown = "import os, sys; print(os.environ.get('PYTHONPATH'), sys.argv[1:])"
    link = [sys.executable, "-c", shown, "$(touch x); y"]
    assert _upgrade.call(link).out == "/a/place/of/the/user ['$(touch x); y']\n"
    other = str(Path(sys.executable).resolve())
    assert _upgrade.call([other, *link[1:]]).out == "None ['$(touch x); y']\n"
    assert _upgrade.call(["/no/such/python"]) == Ended(127, "", "/no/such/python: No such file or directory")  # fmt: skip # noqa: E501
    monkeypatch.setattr(_upgrade, "LIMIT", 0.2)
    assert _upgrade.call([other, "-c", "import time; time.sleep(9)"]).code == 124


def test_an_environment_is_really_made_and_the_current_one_is_untouched(tmp_path: Path) -> None:
    """A real interpreter and a real folder; only pip is played, since it needs the network."""
    before = _isolated.installed()

    def without_network(words: Sequence[str]) -> Ended:
        if "install" in words:
            return GOOD
        quick = ["--without-pip"] if "venv" in words else []
        return _upgrade.call([*words[:3], *quick, *words[3:]])

    made = tmp_path / "made"
    python = _isolated.build(made, {"jax": "0.11.0"}, without_network, here=before)
    shown = "import flaxstab, sys; print(flaxstab.__file__); print(sys.prefix)"
    ended = _upgrade.call([str(python), "-I", "-c", shown])
    assert [Path(line).is_relative_to(made) for line in ended.out.split()] == [True, True]
    quick = _upgrade.call([str(python), "-I", "-m", "flaxstab.cli", "env", "--quick"])
    assert "jax is not installed." in quick.out
    assert quick.code == 1
    assert _isolated.installed() == before


def test_the_reason_is_what_pip_says() -> None:
    with pytest.raises(InstallError, match=r"cannot be installed: No matching distribution"):
        _isolated._done(
            Ended(1, "", "x\nERROR: No matching distribution\ny"), "cannot be installed"
        )
