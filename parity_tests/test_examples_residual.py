"""``examples/residual_depth.py``: the variance grows with depth, and stays where branches are 0."""

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import residual_depth

DEPTH = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> residual_depth.Measured:
    """What the script measured."""
    folder, seen = tmp_path_factory.mktemp("depth"), []
    draw = residual_depth.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_depth, "draw", lambda found: seen.append(found) or draw(found))
        options = ["--blocks", str(DEPTH), "--seeds", "1", "--output", str(folder)]
        assert residual_depth.main(options) == 0
    assert (folder / "variance_along_depth.png").exists()
    return seen[0]


def test_with_branches_that_start_at_zero_the_variance_is_constant(
    run: residual_depth.Measured,
) -> None:
    before, after = (run[kind]["zero_last_gamma"][0] for kind in residual_depth.KINDS)
    np.testing.assert_array_equal(before, np.full(DEPTH + 1, before[0]))
    np.testing.assert_array_equal(after[1:], np.full(DEPTH, after[1]))  # the first ReLU cuts


def test_without_it_grows_by_a_branchs_variance_at_every_block(
    run: residual_depth.Measured,
) -> None:
    for start in ("plain", "branch times 0.1"):
        found, expected = run["pre-activation"][start][0], residual_depth.expected(start, DEPTH)
        # A branch's second moment wanders by about sqrt(5 / 32) with its 32 channels; a mean of 12.
        gap = np.abs((found[-1] - 1) / (expected[-1] - 1) - 1)
        assert gap < 5 * np.sqrt(5 / 32 / DEPTH)
    plain = run["post-activation"]["plain"][0]
    assert plain[-1] > 4 * plain[1]
    assert (np.diff(plain[1:]) > 0).all()


def test_what_is_wrong_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        residual_depth.main(["--blocks", "0"])
    assert stop.value.code == 2
    assert "must be a whole number from 1 to 1000, got 0" in capsys.readouterr().err
