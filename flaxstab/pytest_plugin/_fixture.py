"""The fixture ``parity``: a Flax model beside its PyTorch twin, in anyone's test suite."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    import numpy as np

    from flaxstab._typing import DTypeLike, PyTree
    from flaxstab.parity import Report, Tolerance, TrainStep
    from flaxstab.pytest_plugin._baselines import Baselines
    from flaxstab.pytest_plugin._written import Written


class Parity:
    """What the fixture ``parity`` is.

    Args:
      written: keeps every comparison for ``--parity-report``; None without it.
      baselines: records and compares them for ``--parity-record`` and ``--parity-baseline``.
    """

    def __init__(
        self, written: "Written | None" = None, baselines: "Baselines | None" = None
    ) -> None:
        self._written, self._baselines = written, baselines

    def check(
        self,
        flax_side: "PyTree",
        torch_side: "PyTree",
        *inputs: "np.ndarray",
        layout: Literal["image"] | None = None,
        weights: Literal["torch", "flax"] | None = "torch",
        rename: Callable[[str], str] | None = None,
        dtypes: "Sequence[DTypeLike]" = ("float32",),
        witness: "PyTree" = None,
        tolerances: "Sequence[Tolerance]" = (),
        seed: int = 0,
        reproduce: str | os.PathLike[str] | None = None,
        flax_source: str = "",
        torch_source: str = "",
    ) -> "Report":
        """Compares both sides, and fails the test unless JAX's side is as it should be.

        The arguments are those of :func:`flaxstab.parity.compare`; ``reproduce`` is where to write
        a script that shows the difference alone, if there is one (see
        :func:`flaxstab.parity.reproduce`, also for ``flax_source`` and ``torch_source``). With
        ``--parity-report DIR`` it is written to a file of the test's name there.

        Returns:
          The report of a comparison that passed.
        """
        from flaxstab import parity

        def script(path: Path, report: "Report") -> object:
            return parity.reproduce(
                flax_side, torch_side, *inputs, path=path, layout=layout, weights=weights,
                rename=rename, dtypes=dtypes, seed=seed,
                flax_source=flax_source, torch_source=torch_source, report=report,
            )  # fmt: skip

        def compare() -> "Report":
            options: dict[str, PyTree] = {
                "layout": layout, "weights": weights, "rename": rename, "dtypes": dtypes,
                "witness": witness, "tolerances": tolerances, "seed": seed,
            }  # fmt: skip
            if self._baselines is None:
                return parity.compare(flax_side, torch_side, *inputs, **options)
            subject = parity.Subject(flax_side, torch_side, inputs, **options)
            return self._baselines.compare(subject)

        return self._passed(compare, script, None if reproduce is None else Path(reproduce))

    def verify(
        self,
        flax_model: "PyTree",
        torch_model: "PyTree",
        *inputs: "np.ndarray",
        layout: Literal["image"] | None = None,
        rename: Callable[[str], str] | None = None,
        dtypes: "Sequence[DTypeLike]" = ("float32",),
        tolerances: "Sequence[Tolerance]" = (),
        seed: int = 0,
    ) -> "Report":
        """Loads PyTorch's weights into the Flax model, and fails the test if the two differ.

        The arguments are those of :func:`flaxstab.parity.verify`.

        Returns:
          The report of a comparison that passed.
        """
        from flaxstab import parity

        return self._passed(
            lambda: parity.verify(
                flax_model, torch_model, *inputs, layout=layout, rename=rename,
                dtypes=dtypes, tolerances=tolerances, seed=seed,
            )
        )  # fmt: skip

    def check_trajectory(
        self,
        flax_side: "TrainStep",
        torch_side: "TrainStep",
        batches: "Sequence[Sequence[np.ndarray]]",
        *,
        steps: int,
        layout: Literal["image"] | None = None,
        weights: Literal["torch", "flax"] | None = "torch",
        rename: Callable[[str], str] | None = None,
        dtypes: "Sequence[DTypeLike]" = (),
        tolerances: "Sequence[Tolerance]" = (),
    ) -> "Report":
        """Trains both sides, and fails the test if they part.

        The arguments are those of :func:`flaxstab.parity.trajectory`.

        Returns:
          The report of a training that passed.
        """
        from flaxstab import parity

        def compare() -> "Report":
            options: dict[str, PyTree] = {
                "steps": steps, "layout": layout, "weights": weights, "rename": rename,
                "dtypes": dtypes, "tolerances": tolerances,
            }  # fmt: skip
            if self._baselines is None:
                return parity.trajectory(flax_side, torch_side, batches, **options)
            subject = parity.Subject(flax_side, torch_side, tuple(batches), **options)
            return self._baselines.compare(subject)

        return self._passed(compare)

    def _passed(
        self,
        compare: "Callable[[], Report]",
        script: "Callable[[Path, Report], object] | None" = None,
        path: Path | None = None,
    ) -> "Report":
        """Returns the report, or fails the test with one screen of it.

        Args:
          compare: makes the report.
          script: writes a script that shows the difference; None if none can be written.
          path: where to; None: nowhere, or where the report of the session is.
        """
        report, words, shown = None, "", ""
        try:
            report = compare()
        except ModuleNotFoundError as error:
            words = f"the comparison needs {error.name}: pip install 'flaxstab[torch]'"
        except ValueError as error:
            words = f"cannot compare: {error}"
        if path is None and self._written is not None:
            path = self._written.script()
        if report is not None and not report.passed and script is not None and path is not None:
            shown = _reproduced(script, path, report)
        if self._written is not None:
            self._written.keep(report, words, shown)
        broken = "" if self._baselines is None else self._baselines.broken
        if broken and report is not None and report.passed:
            pytest.fail(f"parity: not as in the baseline: {broken}", pytrace=False)
        if report is not None and report.passed:
            return report
        pytest.fail(f"parity: {words or report}" + (f"\n  {shown}" if shown else ""), pytrace=False)


def _reproduced(script: "Callable[[Path, Report], object]", path: Path, report: "Report") -> str:
    """Says where the script of a difference is, or why there is none."""
    try:
        return f"alone: {script(path, report)}"
    except Exception as error:  # the test's own failure is what must be told
        return f"no script: {error}"
