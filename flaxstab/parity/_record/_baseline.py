"""Baselines: what cases gave in one environment, in one file."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, cast

import numpy as np

from flaxstab import __version__
from flaxstab._files import write_whole
from flaxstab.parity._inputs import Values
from flaxstab.parity._plain import check_header, from_plain, to_plain
from flaxstab.parity._record._bundle import (
    LARGEST_MANIFEST,
    Bundle,
    check_bundles,
    check_members,
    read_bundle,
    read_member,
    write_bundle,
    write_member,
)
from flaxstab.parity._verdict import Finding

FORMAT, SCHEMA = "flaxstab.parity.baseline", 1
_MANIFEST = "manifest.json"
_NOTHING: Values = MappingProxyType({})

Kind = Literal["model", "optimizer", "training", "none"]
Origin = Literal["live", "recorded", "absent"]


class Mark(NamedTuple):
    """A word about something that has a name.

    Attributes:
      name: of what.
      word: a SHA-256, or a sentence.
    """

    name: str
    word: str


class Signature(NamedTuple):
    """A public name and its parameters.

    Attributes:
      name: such as ``'torch.nn.LayerNorm'``.
      parameters: each as it is written, such as ``'eps=1e-05'`` or ``'*'``.
    """

    name: str
    parameters: tuple[str, ...]


class Errors(NamedTuple):
    """How far both sides are off float64 in one quantity of a lower precision.

    Attributes:
      precision: the dtype's name.
      name: of the quantity.
      jax: JAX's error, in eps of the quantity's unit.
      torch: PyTorch's.
      slack: the eps that are allowed beside twice another error.
    """

    precision: str
    name: str
    jax: float
    torch: float
    slack: float = 2.0


class Facts(NamedTuple):
    """What is known of a case beside its arrays.

    Attributes:
      kind: how it is compared; ``'none'`` if it could not be.
      error: why it could not, '' if it could.
      torch: whether PyTorch's side ran or was recorded.
      dtypes: the lower precisions.
      findings: of the live comparison.
      notes: of the same.
      errors: see :class:`Errors`.
      draws: SHA-256 of what each random layer draws.
      hashes: SHA-256 of arrays that are too large to be kept whole, as ``'jax float64 output'`` or
        ``'weights layer.weight'``.
      buffers: names of the weights that are no parameters.
      optional: names of quantities that JAX's side may do without.
      source: the file that large weights were read from, if there was one.
    """

    kind: Kind
    error: str = ""
    torch: Origin = "live"
    dtypes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    errors: tuple[Errors, ...] = ()
    draws: tuple[Mark, ...] = ()
    hashes: tuple[Mark, ...] = ()
    buffers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    source: str = ""

    @property
    def passed(self) -> bool:
        """Whether the case could be compared, and JAX's side was as it should be."""
        return self.kind != "none" and all(finding.passed for finding in self.findings)


class Record(NamedTuple):
    """What one case gave.

    Attributes:
      facts: all but arrays.
      inputs: what both sides were fed.
      weights: what both started from, by PyTorch's names; without those that are too large.
      values: by ``'jax float64'``, ``'torch float32'`` and so on, then by quantity. Large ones are
        folded, see :func:`flaxstab.parity._record._fold.folded`.
      units: by precision and quantity: in float64, 1e-12 of it is the bound of a difference; in
        lower ones, errors are counted in eps of it.
    """

    facts: Facts
    inputs: Values = _NOTHING
    weights: Values = _NOTHING
    values: Mapping[str, Values] = {}
    units: Mapping[str, Values] = {}

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that both sides ran in, float64 first."""
        return tuple(self.units)


class Baseline(NamedTuple):
    """What cases gave in one environment.

    Attributes:
      cases: by name.
      environment: what ``flaxstab env`` tells.
      torch: where PyTorch's values come from: it ran here, or they were recorded, or neither.
      torch_environment: where they were recorded, if they were.
      surface: the public names and their parameters.
      streams: a few draws of each random function, by its name.
      failures: random functions that could not be called, and why.
      flaxstab: the version that wrote it.
    """

    cases: Mapping[str, Record]
    environment: Mapping[str, object] = {}
    torch: Origin = "live"
    torch_environment: Mapping[str, object] = {}
    surface: tuple[Signature, ...] = ()
    streams: Values = _NOTHING
    failures: tuple[Mark, ...] = ()
    flaxstab: str = __version__


class _Held(NamedTuple):
    """A case as the manifest holds it."""

    name: str
    facts: Facts
    bundles: tuple[Bundle, ...]


class _Manifest(NamedTuple):
    """What ``manifest.json`` holds."""

    format: str
    schema: int
    flaxstab: str
    environment: dict[str, object]
    torch: Origin
    torch_environment: dict[str, object]
    surface: tuple[Signature, ...]
    failures: tuple[Mark, ...]
    streams: Bundle
    cases: tuple[_Held, ...]


def write_baseline(baseline: Baseline, path: str | os.PathLike[str]) -> Path:
    """Writes a baseline, whole or not at all; equal ones give equal files.

    Args:
      baseline: what is written.
      path: of the file. Its folder must exist.

    Returns:
      The path.
    """
    return write_whole(path, lambda unfinished: _write(baseline, unfinished))


def _write(baseline: Baseline, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        held = []
        for place, (name, record) in enumerate(baseline.cases.items()):
            groups = {
                "inputs": record.inputs,
                "weights": record.weights,
                **record.values,
                **{f"units {precision}": units for precision, units in record.units.items()},
            }
            bundles = tuple(
                write_bundle(file, f"cases/{place}/{group}", arrays)
                for group, arrays in groups.items()
            )
            held.append(_Held(name, record.facts, bundles))
        told = {
            field: value
            for field, value in baseline._asdict().items()
            if field not in ("cases", "streams")
        }
        streams = write_bundle(file, "streams", baseline.streams)
        told = {"format": FORMAT, "schema": SCHEMA, **told, "streams": streams, "cases": held}
        text = json.dumps(to_plain(told), allow_nan=False, separators=(",", ":"))
        write_member(file, _MANIFEST, text.encode())


def read_baseline(path: str | os.PathLike[str]) -> Baseline:
    """Reads a baseline; nothing in the file is trusted.

    Args:
      path: of the file.

    Raises:
      ValueError: if it is not there, not whole, foreign, too large, or written by a newer flaxstab;
        the message names the place in it.
    """
    target = Path(path)
    if not target.is_file():
        raise ValueError(
            f"a baseline must be a file, got {str(target)!r}, which is not there. Write one: "
            "flaxstab parity record FILE."
        )
    try:
        with zipfile.ZipFile(target) as file:
            return _read(file)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        words = f"got no whole zip file ({error})"
    except ValueError as error:
        words = str(error).rstrip(".")
    raise ValueError(
        f"{target.name} must be a baseline: {words}. Write it again with flaxstab parity record, "
        "or name another file."
    )


def _read(file: zipfile.ZipFile) -> Baseline:
    check_members(file)
    manifest = _manifest(read_member(file, _MANIFEST, LARGEST_MANIFEST))
    check_bundles([manifest.streams, *(b for held in manifest.cases for b in held.bundles)])
    cases = {}
    for held in manifest.cases:
        start = (f"{_MANIFEST}: cases must have names of their own, got {held.name!r} twice",)
        if held.name in cases:
            raise ValueError(*start)
        cases[held.name] = _record(file, held)
    return Baseline(
        cases,
        manifest.environment,
        manifest.torch,
        manifest.torch_environment,
        manifest.surface,
        read_bundle(file, manifest.streams),
        manifest.failures,
        manifest.flaxstab,
    )


def _record(file: zipfile.ZipFile, held: _Held) -> Record:
    groups = {b.name.split("/", 2)[-1]: read_bundle(file, b) for b in held.bundles}
    units = {n.removeprefix("units "): a for n, a in groups.items() if n.startswith("units ")}
    values = {n: a for n, a in groups.items() if n.startswith(("jax ", "torch "))}
    known = {"inputs", "weights", *values, *(f"units {n}" for n in units)}
    if groups.keys() - known:
        raise ValueError(
            f"{held.name!r} must hold inputs, weights, values and units, got "
            f"{sorted(groups.keys() - known)[:3]}"
        )
    if held.facts.kind != "none" and "float64" not in units:
        raise ValueError(f"{held.name!r} must hold units and values in float64, got none")
    _check_units(held.name, values, units)
    none: dict[str, np.ndarray] = {}
    inputs, weights = groups.get("inputs", none), groups.get("weights", none)
    return Record(held.facts, inputs, weights, values, units)


def _check_units(name: str, values: Mapping[str, Values], units: Mapping[str, Values]) -> None:
    """Refuses units that do not fit the values they are for."""
    for precision, group in units.items():
        for side in ("jax", "torch"):
            if f"{side} {precision}" not in values:
                raise ValueError(f"{name!r} must hold {side}'s values in {precision}, got none")
        for key, unit in group.items():
            value = values[f"jax {precision}"].get(key)
            if value is None or unit.shape not in ((), value.shape) or unit.dtype != np.float64:
                shape = "none" if value is None else value.shape
                rule = f"{name!r} must have a unit of the shape of {key!r} in {precision}, {shape}"
                raise ValueError(f"{rule}, got {unit.dtype} of shape {unit.shape}")


def _manifest(content: bytes) -> _Manifest:
    try:
        held = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_MANIFEST} must be JSON, got {error}") from None
    check_header(held, _MANIFEST, FORMAT, SCHEMA)
    return cast(_Manifest, from_plain(_Manifest, held, _MANIFEST))
