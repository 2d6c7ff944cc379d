"""``examples/decay_matters.py`` trains, measures, draws, and finds what its page says."""

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import _data
import _jax_side
import decay_matters


def test_decay_shrinks_norm_scales_where_no_mask_exempts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, one = _data.load_small(), _jax_side.data_mesh(1)
    images = _data.Cifar10(*(a[::52] if i < 2 else a[::20] for i, a in enumerate(whole)))
    monkeypatch.setattr(decay_matters, "load_small", lambda: images)
    monkeypatch.setattr(_jax_side, "data_mesh", lambda _: one)
    plans, courses, draw = {}, {}, decay_matters.draw

    def watched(*drawn: dict[object, object]) -> object:
        for kept, given in zip((plans, courses), drawn, strict=True):
            kept.update(given)
        return draw(*drawn)

    monkeypatch.setattr(decay_matters, "draw", watched)
    monkeypatch.setattr(decay_matters, "DECAYS", (0.5,))
    monkeypatch.setattr(decay_matters, "SIZES", {"widths": (4,), "groups": 2})
    arguments = ["--samples", "96", "--epochs", "4", "--output", str(tmp_path)]
    assert decay_matters.main(arguments) == 0
    assert (tmp_path / "decay_matters.png").exists()
    assert "without the mask the scales are" in capsys.readouterr().out
    left = decay_matters.decay_alone(plans[0.5])
    rates = [0.5 * plan * 3e-3 for plan in (0, 1)]  # a climb of one step, then a cosine
    assert left[:2].tolist() == pytest.approx(np.cumprod(1 - np.array(rates)), abs=1e-7)
    means = {name: run.scales[-1, 0] for (_, name), run in courses.items()}
    assert means["everything"] < means["weights"]
    weights = {name: run.weights[-1] for (_, name), run in courses.items()}
    assert weights["L2"] < min(weights["everything"], weights["weights"])
    # The loss moves the scales a little differently: by less than a tenth of what decay takes.
    gap = abs(means["everything"] / means["weights"] - left[-1])
    assert gap < 0.1 * (1 - left[-1])
    assert len(courses[0.5, "L2"].accuracies) == 4


def test_an_unknown_norm_gives_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        decay_matters.main(["--norm", "none"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "invalid choice: 'none'" in said
    assert said.count("\n") == 1
