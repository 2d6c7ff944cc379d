"""The pytest fixture ``parity``: a Flax model beside its PyTorch twin, in anyone's test suite.

``--parity-report DIR`` writes every comparison of a session to ``DIR/parity.json`` and
``DIR/parity.html``, also of tests that pass and under pytest-xdist.

``--parity-record FILE`` writes all that they computed to a baseline; ``--parity-baseline FILE``
compares them with one, and fails a test whose comparison breaks what was right then.

Loaded by pytest wherever flaxstab is installed, so it imports neither JAX nor PyTorch before use.
"""

from pathlib import Path

import pytest

from flaxstab.pytest_plugin._baselines import baselines
from flaxstab.pytest_plugin._fixture import Parity as Parity
from flaxstab.pytest_plugin._written import Written

_NAME = "flaxstab-parity-report"
_BASELINES = "flaxstab-parity-baselines"


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> Parity:
    """The harness: ``parity.check(flax_model, torch_model, *inputs, layout=...)``."""
    find = request.config.pluginmanager.get_plugin
    return Parity(find(_NAME), find(_BASELINES))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the fixture ``parity``."""
    group = parser.getgroup("parity")
    group.addoption(
        "--parity-report",
        metavar="DIR",
        help="write every comparison of the fixture 'parity' to DIR/parity.json and parity.html",
    )
    group.addoption(
        "--parity-record",
        metavar="FILE",
        help="write inputs, weights and results of every comparison to a baseline",
    )
    group.addoption(
        "--parity-baseline",
        metavar="FILE",
        help="compare every comparison with an earlier baseline; what breaks fails its test",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of the report at once, so that hours of tests do not end in an error."""
    kept = baselines(config)
    if kept is not None:
        config.pluginmanager.register(kept, _BASELINES)
    folder = config.getoption("--parity-report")
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"--parity-report must name a folder that exists or can be made, got {folder!r}: "
            f"{error.strerror}."
        ) from None
    config.pluginmanager.register(Written(config, Path(folder)), _NAME)
