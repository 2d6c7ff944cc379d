"""The character model learns what it says: its batches, its looks, its samples."""

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)

# isort: split
from parity_tests.support.char_lm_runs import (
    SIZES,
    bits,
    no_figures,
    page,
    quick_compiler,
    run_of,
    whole,
)  # first: it finds the examples

# isort: split
import _text
from _checkpoint import Checkpoints
from _language import LanguageRun

from parity_tests.support.layers import assert_same

__all__ = ["no_figures", "page", "quick_compiler", "whole"]


def test_batches_depend_on_seed_and_step_alone(page: Path) -> None:
    run = run_of(page, context=8)
    text = jnp.arange(12)  # four places for a window of nine
    steps = jnp.arange(20)

    batches = jax.jit(jax.vmap(run.batch, (0, None)))
    found = batches(steps, text)
    assert found.shape == (20, 11, 9)
    np.testing.assert_array_equal(
        found - found[..., :1], np.broadcast_to(np.arange(9), (20, 11, 9))
    )
    # 220 draws miss one of four places with a probability below 4 * 0.75 ** 220 = 1e-27.
    assert set(np.asarray(found[..., 0]).ravel()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(batches(steps[::-1], text)[::-1], found)
    assert (jax.jit(run_of(page, seed=1).batch)(steps[7], text) != found[7]).any()


@pytest.fixture(scope="module")
def wild(page: Path) -> LanguageRun:
    """A float64 model with weights so large that it has opinions."""
    with jax.enable_x64(True):
        run = run_of(page, dtype="float64")
        rng = np.random.default_rng(0)
        weights = nnx.filter_state(run.state["model"], nnx.Param)
        drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), weights)
        state = nnx.merge_state(run.state["model"], drawn)
        run.state = nnx.State({"model": state, "optimizer": run.state["optimizer"]})
        return run


ROWS = 64


def log_probabilities(run: LanguageRun, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Returns those that follow each character of each row: by one program, for all tests."""
    windows = np.zeros((ROWS, SIZES["context"]), np.int32)
    for window, row in zip(windows, rows, strict=False):
        window[: len(row)] = row
    logits = np.asarray(evaluated(run.state, jnp.asarray(windows), run._graph))
    shifted = logits - logits.max(-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return [found[i, : len(row)] for i, row in enumerate(rows)]


@partial(jax.jit, static_argnums=2)
def evaluated(state: nnx.State, windows: jax.Array, graph: nnx.GraphDef) -> jax.Array:
    model = nnx.merge(graph, state)["model"]
    model.eval()
    return model(windows)


def test_the_validation_loss_is_the_mean_over_every_character_but_the_first(
    page: Path, wild: LanguageRun
) -> None:
    valid = _text.load_text(page).valid
    assert (len(valid) - 1) % 8
    with jax.enable_x64(True):
        blocks = [valid[i : i + 9] for i in range(0, len(valid) - 1, 8)]
        found = log_probabilities(wild, [block[:-1] for block in blocks])
        terms = [
            -logs[np.arange(len(block) - 1), block[1:]]
            for logs, block in zip(found, blocks, strict=True)
        ]
        expected = np.concatenate(terms)
        assert expected.shape == (len(valid) - 1,)
        assert_same(np.float64(wild.evaluate()), expected.mean(), np.abs(expected).max())


def test_the_window_fills_up_then_moves_along(page: Path, wild: LanguageRun) -> None:
    prompt = _text.load_text(page).encoded("Ber.\n")
    with jax.enable_x64(True):
        found = np.concatenate([prompt, wild.sample(prompt, 40, 0.0, 0)])
        seen = [found[max(0, i - 8) : i] for i in range(len(prompt), len(found))]
        expected = [logs[-1].argmax() for logs in log_probabilities(wild, seen)]
        cold = wild.sample(prompt, 40, 0.0, 1)
    assert len(prompt) < 8
    assert len(set(found.tolist())) > 4
    np.testing.assert_array_equal(found[len(prompt) :], expected)
    np.testing.assert_array_equal(cold, found[len(prompt) :])


def test_sampling_follows_the_probabilities_and_is_compiled_once(
    page: Path, wild: LanguageRun
) -> None:
    text = _text.load_text(page)
    with jax.enable_x64(True):
        prompt = text.encoded("Ber.\nWho's there")  # longer than what the model sees
        before = wild._sample._cache_size()
        draws = [wild.sample(prompt, 1, 2.0, seed)[0] for seed in range(300)]
        short = wild.sample(prompt[:2], 1, 1.0, 0)
        (logs,) = log_probabilities(wild, [prompt[-8:]])
        logits = logs[-1] / 2
    shares = np.exp(logits) / np.exp(logits).sum()
    assert wild._sample._cache_size() == before + 1
    assert 0 <= short[0] < len(shares)
    counts = np.bincount(draws, minlength=len(shares))
    # Six standard deviations of each count, and one draw for those that hardly ever come.
    bound = 6 * np.sqrt(300 * shares * (1 - shares)) + 1
    assert np.all(np.abs(counts - 300 * shares) <= bound)


def test_eight_devices_give_the_numbers_of_one(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()
    assert len(devices) == 8
    found, runs = {}, {}
    with jax.enable_x64(True):
        for count in (1, 8):
            monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
            run = runs[count] = run_of(page, dtype="float64", batch_size=16, dropout=0.0)
            assert run.devices == count
            found[count] = np.stack([run.step() for _ in range(3)]), run.evaluate()
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(3, runs[8].state, {})
        moved = checkpoints.restore(3, runs[1].state)
        assert bits(moved) == bits(runs[8].state)
        assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(moved))
    # Loss, gradient norm, rate: sums over the batch in another order.
    bound = 4096 * np.finfo(np.float64).eps
    for one, eight in zip(found[1], found[8], strict=True):
        assert np.max(np.abs(one - eight)) <= bound * np.max(np.abs(one))


def test_a_step_moves_nothing_to_or_from_the_devices_and_compiles_once(page: Path) -> None:
    run = run_of(page)
    run.step()
    run.step()
    assert run._step._cache_size() == 1
    with jax.transfer_guard("disallow"):
        reports = [run.step() for _ in range(2)]
    assert np.isfinite(reports).all()


def test_options_reach_the_model(page: Path) -> None:
    run = run_of(page, dtype="bfloat16", depth=2, scan=True, remat=True)
    model = nnx.merge(run._graph, run.state)["model"]
    found = (model.blocks.scan, model.blocks.remat, model.embed.dtype)
    assert found == (True, True, jnp.bfloat16)
    state, report = jax.eval_shape(run._train_step, run.state, run._text)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), run.state
    )
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.Param))}
    assert kinds == {"float32"}
    assert report.dtype == jnp.float32


def test_the_text_is_cut_and_counted_as_a_loop_does(page: Path) -> None:
    text = _text.load_text(page)
    content = page.read_text("utf-8")
    assert text.decoded(np.concatenate([text.train, text.valid])) == content
    assert len(text.valid) == len(content) // 10
    np.testing.assert_array_equal(text.encoded(content[-120:]), text.valid)
    numbers = text.train.tolist()
    pairs, first = Counter(pairwise(numbers)), Counter(numbers[:-1])
    loss = -sum(n * math.log(n / first[a]) for (a, _), n in pairs.items()) / (len(numbers) - 1)
    assert_same(np.float64(_text.bigram_entropy(text.train)), np.float64(loss))
    letters = Counter(numbers[1:])
    loss = -sum(n * math.log(n / (len(numbers) - 1)) for n in letters.values()) / (len(numbers) - 1)
    assert_same(np.float64(_text.letter_entropy(text.train)), np.float64(loss))
    inputs, targets = _text.windows(text.valid, 8, 5)
    assert len(inputs) % 5 == 0
    seen = targets != _text.IGNORED
    np.testing.assert_array_equal(targets[seen], text.valid[1:])
    np.testing.assert_array_equal(inputs[seen], text.valid[:-1])
    assert _text.words("Who's there?\n--Nay, answer") == ["who's", "there", "nay", "answer"]
