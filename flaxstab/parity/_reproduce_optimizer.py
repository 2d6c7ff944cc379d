"""The smallest failing case of an optax transformation beside a torch optimizer."""

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from flaxstab._checks import check
from flaxstab._typing import DTypeLike, PyTree
from flaxstab.parity._inputs import round_to
from flaxstab.parity._optimizers import compare_optimizers, gradients
from flaxstab.parity._script import Quantity, Side, Specimen
from flaxstab.parity._sources import Call, source_of
from flaxstab.parity._specimen import differs
from flaxstab.parity._verdict import SEMANTICS, Finding

_SLACK = 10.0  # eps of float32 per step, of the largest change: what rounding may do in a script


class _Case(NamedTuple):
    """One parameter with the gradients of each step."""

    parameter: np.ndarray
    gradients: tuple[np.ndarray, ...]


def optimizer_specimen(
    tx: optax.GradientTransformation,
    factory: PyTree,
    inputs: Sequence[np.ndarray],
    dtypes: Sequence[DTypeLike],
    seed: int,
    flax_source: str,
    torch_source: str,
) -> Specimen:
    """Returns the fewest steps, parameters and elements that show that two optimizers differ.

    Args:
      tx: the transformation.
      factory: makes the torch optimizer of a list of parameters.
      inputs: the parameters.
      dtypes: as in :func:`compare`.
      seed: of the gradients.
      flax_source: the expression that makes ``tx``.
      torch_source: the expression that makes ``factory``; '' to find one.

    Raises:
      ValueError: if both agree, or the changes of parameters do not show the difference.
    """
    report = compare_optimizers(
        tx, factory, inputs, dtypes=dtypes, tolerances=(), witness=None, seed=seed
    )
    failing = [f for f in report.findings if not f.passed]
    check(bool(failing), "the two sides must differ", verdict=str(report.verdict))
    calls = source_of(tx, flax_source, "flax_source"), _factory(factory, torch_source)
    low = [jnp.dtype(kind).name for kind in dtypes]
    stored = "float32" if "float32" in low else "float64"
    steps = [tuple(round_to(a, stored) for a in batch) for batch in gradients(inputs, seed)]
    first = len(steps) if report.departure is None else report.departure.step
    for place, parameter in enumerate(inputs):
        case = _Case(round_to(parameter, stored), tuple(batch[place] for batch in steps))
        for n in sorted({first, len(steps)}):
            whole = _specimen(calls, _Case(case.parameter, case.gradients[:n]), failing)
            if differs(whole):
                return _smallest(calls, case, failing, n)
    raise ValueError(
        "a script shows what steps change a parameter by, got a difference that only the "
        f"optimizer's state or all parameters together show: {failing[0].name}."
    )


def _factory(factory: PyTree, given: str) -> Call:
    """Returns an expression that makes a torch optimizer as a factory does."""
    if given:
        return source_of(factory, given, "torch_source")
    import torch

    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.zeros_like(parameter)
    made = factory([parameter])
    kind = type(made)
    own = isinstance(made, torch.optim.Optimizer) and getattr(torch.optim, kind.__name__, 0) is kind
    fix = "Pass torch_source='lambda ps: torch.optim.Adam(ps, lr=0.1)', or what makes yours."
    check(own, "a script must be able to make both sides", torch_side=kind.__name__, fix=fix)
    (group,) = made.param_groups
    known = inspect.signature(kind).parameters
    options = {
        n: value
        for n, value in group.items()
        if n in known and n != "params" and value != known[n].default
    }
    words = "".join(f", {n}={value!r}" for n, value in options.items())
    return Call(f"lambda ps: torch.optim.{kind.__name__}(ps{words})")


def _specimen(calls: tuple[Call, Call], case: _Case, failing: Sequence[Finding]) -> Specimen:
    wide = any(f.dtype == "float64" for f in failing)
    dtype = "float64" if wide else failing[0].dtype
    n = len(case.gradients)
    bound = SEMANTICS * n if wide else _SLACK * n * float(jnp.finfo(dtype).eps)
    told = [(f"step {i + 1}", gradient) for i, gradient in enumerate(case.gradients)]
    name = f"the change after {n} steps"
    sides = Side(calls[0]), Side(calls[1])
    quantity = Quantity(name, "optimizer", n)
    return Specimen(*sides, (case.parameter,), told, None, quantity, dtype, bound)


def _smallest(
    calls: tuple[Call, Call], case: _Case, failing: Sequence[Finding], steps: int
) -> Specimen:
    """Returns the specimen of the fewest steps, and then of the fewest elements."""
    best = _specimen(calls, _Case(case.parameter, case.gradients[:steps]), failing)
    for n in range(1, steps):
        found = _specimen(calls, _Case(case.parameter, case.gradients[:n]), failing)
        if differs(found):
            best, steps = found, n
            break
    kept = _Case(case.parameter, case.gradients[:steps])
    for cut in _cuts(kept):
        found = _specimen(calls, cut, failing)
        if differs(found):
            return found
    return best


def _cuts(case: _Case) -> Iterator[_Case]:
    """Yields one element alone, then more of them."""
    size = case.parameter.size
    for n in (1, 2, 4, 16):
        for start in range(0, min(size, 4 * n), n) if n < size else ():
            part = slice(start, start + n)
            flat = tuple(g.reshape(-1)[part] for g in case.gradients)
            yield _Case(case.parameter.reshape(-1)[part], flat)
