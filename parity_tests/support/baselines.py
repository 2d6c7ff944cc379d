"""Small baselines made by hand: what a diff must find is planted in their arrays."""

import numpy as np

from flaxstab.parity._inputs import Values
from flaxstab.parity._record import Baseline, Record
from flaxstab.parity._record._baseline import Errors, Facts, Mark, Signature
from flaxstab.parity._verdict import Finding, Verdict

EPS32 = float(np.finfo(np.float32).eps)
NAMES = ("output", "grad input 0", "evaluation")


def values(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float64 values of every quantity."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(3.0, 2.0, (4, 3)) for name in NAMES}


def low(exact: Values) -> dict[str, np.ndarray]:
    """Returns values as a side has them in float32."""
    return {name: array.astype(np.float32) for name, array in exact.items()}


def record(**groups: Values) -> Record:
    """Returns a record of a case in which both sides agree.

    Args:
      **groups: other values, such as ``jax_float64``.
    """
    exact = values()
    made = {
        "jax float64": exact, "torch float64": exact,
        "jax float32": low(exact), "torch float32": low(exact),
    } | {name.replace("_", " "): group for name, group in groups.items()}  # fmt: skip
    units = {name: np.asarray(np.max(np.abs(array))) for name, array in exact.items()}
    findings = tuple(
        Finding(name, Verdict.AGREE, kind, 0.25, 0.25, 2.5, "they agree")
        for kind in ("float64", "float32")
        for name in NAMES
    )
    errors = tuple(Errors("float32", name, 0.25, 0.25) for name in NAMES)
    facts = Facts("model", dtypes=("float32",), findings=findings, errors=errors)
    inputs = {"input 0": np.ones((4, 3))}
    weights = {"weight": np.ones(3, np.float32)}
    return Record(facts, inputs, weights, made, {"float64": units, "float32": units})


def changed(group: Values, name: str, by: float) -> dict[str, np.ndarray]:
    """Returns values of which one element of a quantity is changed, relative to itself."""
    array = group[name].copy()
    array.flat[5] *= 1 + by
    return {**group, name: array}


def with_facts(made: Record, **facts: object) -> Record:
    """Returns a record of which other things are told."""
    return made._replace(facts=made.facts._replace(**facts))


def baseline(**cases: Record) -> Baseline:
    """Returns a baseline with a small surface and a stream."""
    surface = (
        Signature("flax.nnx.Norm", ("features", "*", "eps=1e-05")),
        Signature("torch.nn.Norm", ("features", "eps=1e-05", "affine=True")),
    )
    streams = {"jax.random.normal": np.linspace(-1, 1, 8, dtype=np.float32)}
    environment = {"packages": {"jax": "0.10.2", "torch": "2.13.0"}}
    made = cases or {"layer": record()}
    return Baseline(made, environment, surface=surface, streams=streams)


def drawn(word: str) -> tuple[Mark, ...]:
    """Returns what the random layer of a case drew, as a word."""
    return (Mark("drop", word),)
