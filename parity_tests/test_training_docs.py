"""``docs/training.md`` runs when pasted, and says of optax and PyTorch what is so."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.optim import lr_scheduler

from flaxstab import functional, optim
from parity_tests.support.layers import assert_same
from parity_tests.support.pages import pasted

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("the docs are not part of the wheel", allow_module_level=True)
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def rows(pattern: str) -> list[list[str]]:
    lines = (line for line in PAGE.splitlines() if re.match(pattern, line))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_on_training_runs_when_pasted() -> None:
    names = pasted(PAGE)
    assert names["left_out"] == 1
    best, model = names["best"], names["model"]
    assert bool(best.stop) or names["epoch"] == 19
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(nnx.state(model)))
    # The clean step and the loop's moved the statistics, the step that was left out did not.
    assert int(model.norm.count[...]) <= int(names["epoch"]) + 2
    fresh = names["Net"](nnx.Rngs(0))
    exact = sum(np.square(np.asarray(k[...], np.float64)).sum() / 200
                for k in (fresh.first.kernel, fresh.last.kernel))  # fmt: skip
    assert abs(float(names["penalty"]) - exact) <= 8 * np.finfo(np.float32).eps * exact
    assert names["rates"].shape == (900,)


@pytest.mark.parametrize("cells", rows(r"\| 1?0*1? \| \d"), ids=lambda cells: cells[0])
def test_the_table_of_last_rates_says_what_is_found(cells: list[str]) -> None:
    """Figures move with the machine: ours keep the bound, optax's do not."""
    total, left = 100_000, int(cells[0])
    exact = math.sin(math.pi / 2 * left / (total - 1000)) ** 2
    schedules = (
        optim.warmup_cosine(1.0, 1000, total),
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 1000, total),
    )
    found = [abs(float(schedule(total - left)) / exact - 1) for schedule in schedules]
    for ours, theirs in (found, [float(cell) for cell in cells[1:]]):
        assert ours <= 8 * np.finfo(np.float32).eps
        # Half an eps of 1 + cos, over the 2.5e-10 left**2 that it comes to.
        assert theirs > min(0.5, 10 / left**2)


def test_the_table_has_four_rows() -> None:
    assert [cells[0] for cells in rows(r"\| 1?0*1? \| \d")] == ["1000", "100", "10", "1"]


def _torchs(make: Callable[[torch.optim.Optimizer], object], steps: int) -> np.ndarray:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def test_torchs_other_schedulers_are_in_optax_as_the_page_says() -> None:
    counts = np.arange(100)
    pairs = [
        (optax.piecewise_constant_schedule(0.1, {30: 0.1, 60: 0.1}),
         lambda o: lr_scheduler.MultiStepLR(o, [30, 60])),
        (optax.polynomial_schedule(0.1, 0.0, 2.0, 50),
         lambda o: lr_scheduler.PolynomialLR(o, 50, 2.0)),
    ]  # fmt: skip
    with jax.enable_x64(True):
        ours = jax.jit(jax.vmap(lambda n: [schedule(n) for schedule, _ in pairs]))(counts)
        for rates, (_, make) in zip(ours, pairs, strict=True):
            assert_same(rates, _torchs(make, 100), size=0.1)


def test_optaxs_cross_entropy_does_with_labels_what_the_page_says() -> None:
    logits = jnp.array([[0.0, 0.0, 2.0]])
    ignored, negative, last = (
        float(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([label]))[0])
        for label in (-100, -1, 2)
    )
    assert math.isnan(ignored)
    assert negative == last
    with pytest.raises(ValueError, match="labels must lie in"):
        functional.cross_entropy(logits, jnp.array([-1]))


def test_the_decay_that_the_page_names_is_that_of_the_schedules() -> None:
    def left(peak: float, warmup: int, total: int, decay: float) -> float:
        rates = np.asarray(optim.warmup_cosine(peak, warmup, total)(np.arange(total)), np.float64)
        return float(np.prod(1 - rates * decay))

    scales = {(cells[0], cells[1]): float(cells[2]) for cells in rows(r"\| 0\.\d+ \| Adam")}
    assert len(scales) == 6
    told = re.findall(r"0\.\d{3}\b", PAGE.partition("whatever their gradients:")[2])
    steps = 6 * (3000 // 32)
    assert f", {steps} steps" in PAGE
    for decay in ("0.05", "0.2"):
        exact = left(3e-3, steps // 10, steps, float(decay))
        ratio = scales[decay, "AdamW, no mask"] / scales[decay, "AdamW, mask"]
        assert f"{exact:.3f}" in told
        assert min(abs(ratio - float(number)) for number in told) <= 0.001  # of rounded scales
        assert abs(ratio - exact) < 0.1 * (1 - exact)
        lost = (1 - scales[decay, "Adam with L2"]) / (3e-3 * steps / 2)  # the mean rate is half
        assert abs(lost - 0.75) < 0.05
    assert f"{left(3e-4, 500, 100_000, 0.05):.2f}" == "0.47"
    assert "100,000 steps of cosine, it is 0.47" in PAGE.replace("\n  ", " ")
