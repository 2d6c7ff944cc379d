"""The pytest fixture ``parity``: a Flax model beside its PyTorch twin, in anyone's test suite.

Loaded by pytest wherever flaxstab is installed, so it imports neither JAX nor PyTorch before use.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    import numpy as np

    from flaxstab._typing import DTypeLike, PyTree
    from flaxstab.parity import Report, Tolerance, TrainStep


class Parity:
    """What the fixture ``parity`` is."""

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
    ) -> "Report":
        """Compares both sides, and fails the test unless JAX's side is as it should be.

        The arguments are those of :func:`flaxstab.parity.compare`.

        Returns:
          The report of a comparison that passed.
        """
        from flaxstab import parity

        return _passed(
            lambda: parity.compare(
                flax_side, torch_side, *inputs, layout=layout, weights=weights, rename=rename,
                dtypes=dtypes, witness=witness, tolerances=tolerances, seed=seed,
            )
        )  # fmt: skip

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

        return _passed(
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

        return _passed(
            lambda: parity.trajectory(
                flax_side, torch_side, batches, steps=steps, layout=layout, weights=weights,
                rename=rename, dtypes=dtypes, tolerances=tolerances,
            )
        )  # fmt: skip


def _passed(compare: "Callable[[], Report]") -> "Report":
    """Returns the report, or fails the test with one screen of it."""
    report, words = None, ""
    try:
        report = compare()
    except ModuleNotFoundError as error:
        words = f"the comparison needs {error.name}: pip install 'flaxstab[torch]'"
    except ValueError as error:
        words = f"cannot compare: {error}"
    if report is not None and report.passed:
        return report
    pytest.fail(f"parity: {words or report}", pytrace=False)


@pytest.fixture(scope="session")
def parity() -> Parity:
    """The harness: ``parity.check(flax_model, torch_model, *inputs, layout=...)``."""
    return Parity()
