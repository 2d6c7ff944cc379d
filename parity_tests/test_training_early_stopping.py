"""Early stopping under ``jit`` against ``torch_ref``'s in plain Python."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.training import early_stopping as flax_early_stopping

from flaxstab import linear, training
from flaxstab.training import EarlyStoppingState
from torch_ref import training as reference

CURVES, EPOCHS = 200, 40
PATIENCES = (1, 2, 5)
DELTAS = (0.0, 0.25)
MODES = ("min", "max")


@functools.cache
def curves() -> np.ndarray:
    """Noisy falls that turn up again, with plateaus, infinity and NaN in places."""
    rng = np.random.default_rng(0)
    epochs = np.arange(EPOCHS)
    bottoms = rng.uniform(0, EPOCHS, (CURVES, 1))
    values = 0.02 * np.abs(epochs - bottoms) + rng.normal(0, 0.2, (CURVES, EPOCHS))
    values[::3] = values[::3].round(1)  # equal values are no improvement
    places = rng.uniform(size=values.shape)
    values[places < 0.02] = np.nan
    values[(places > 0.02) & (places < 0.03)] = np.inf
    values[5, :] = np.nan
    values[6, 0] = np.nan
    return values


def run(
    values: jax.Array, patience: jax.Array, min_delta: jax.Array, *, mode: str
) -> tuple[EarlyStoppingState, dict[str, jax.Array]]:
    """The state after a curve, whose kept tree is the epoch, and what each epoch said."""
    stopping = training.early_stopping(patience, min_delta, mode)

    def body(
        state: EarlyStoppingState, at: tuple[jax.Array, jax.Array]
    ) -> tuple[EarlyStoppingState, dict[str, jax.Array]]:
        epoch, value = at
        state = stopping.update(state, value, {"epoch": epoch})
        return state, {"stop": state.stop, "best": state.best, "waited": state.waited}

    return jax.lax.scan(body, stopping.init({"epoch": jnp.array(-1)}), (jnp.arange(EPOCHS), values))


@functools.cache
def found() -> dict[str, tuple[EarlyStoppingState, dict[str, np.ndarray]]]:
    """Every curve with every patience and delta, by mode: (patience, delta, curve, epoch)."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        results = {}
        for mode in MODES:
            sign = 1 if mode == "min" else -1
            each = functools.partial(run, mode=mode)
            each = jax.vmap(each, (0, None, None))
            each = jax.vmap(jax.vmap(each, (None, None, 0)), (None, 0, None))
            made = jax.jit(each)(sign * curves(), jnp.array(PATIENCES), jnp.array(DELTAS))
            results[mode] = jax.tree.map(np.asarray, made)
        return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patience", PATIENCES)
@pytest.mark.parametrize("min_delta", DELTAS)
def test_early_stopping_is_torch_refs_on_every_curve(
    mode: str, patience: int, min_delta: float
) -> None:
    at = PATIENCES.index(patience), DELTAS.index(min_delta)
    state, steps = found()[mode]
    sign = 1 if mode == "min" else -1
    stopped = 0
    for row, values in enumerate(curves()):
        stopping = reference.EarlyStopping(patience, min_delta)
        best_epoch = -1
        for epoch, value in enumerate(values):
            before = stopping.best
            assert steps["stop"][at][row, epoch] == stopping.update(float(value))
            assert steps["best"][at][row, epoch] == sign * stopping.best
            assert steps["waited"][at][row, epoch] == stopping.waited
            best_epoch = epoch if stopping.best != before else best_epoch
        assert state.kept["epoch"][at][row] == best_epoch
        stopped += bool(steps["stop"][at][row].any())
    assert stopped >= CURVES / 4  # or the curves would prove nothing


def test_min_delta_defaults_to_0_and_the_mode_to_min() -> None:
    default, named = training.early_stopping(3), training.early_stopping(3, 0.0, "min")
    for value in (2.0, 1.0, 1.0):
        results = [s.update(s.init(None), value, None) for s in (default, named)]
        assert results[0] == results[1]
        assert results[0].kept is None
    assert float(default.init(None).best) == math.inf


def test_the_best_weights_of_a_run_that_donates_its_own_come_back() -> None:
    stopping = training.early_stopping(patience=2)
    model = linear.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state: nnx.State, loss: jax.Array, kept: EarlyStoppingState) -> tuple:
        state = jax.tree.map(lambda a: a + 1, state)
        return state, stopping.update(kept, loss, state)

    kept = stopping.init(state)
    losses = [3.0, 1.0, 2.0, 1.5]
    weights = []
    for loss in losses:
        state, kept = epoch(state, loss, kept)
        weights.append(np.asarray(state["kernel"][...]).copy())
    assert bool(kept.stop)
    nnx.update(model, kept.kept)
    np.testing.assert_array_equal(model.kernel[...], weights[1])
    assert nnx.merge(graph, kept.kept).kernel[...].shape == (3, 2)
    assert epoch._cache_size() == 1


def test_a_live_models_state_may_be_kept_in_eager_mode() -> None:
    stopping = training.early_stopping(patience=2, mode="max")
    model = linear.Linear(3, 2, rngs=nnx.Rngs(dropout=1, params=0))
    rngs = nnx.Rngs(5)  # keys are kept as well as numbers
    kept = stopping.init(nnx.state((model, rngs)))
    for accuracy in (0.5, 0.9, 0.7):
        model.kernel[...] += 1.0
        rngs.params()
        kept = stopping.update(kept, accuracy, nnx.state((model, rngs)))
        if accuracy == 0.9:
            best = np.asarray(model.kernel[...]).copy()
    nnx.update((model, rngs), kept.kept)
    np.testing.assert_array_equal(model.kernel[...], best)
    assert int(rngs.params.count[...]) == 2
    assert float(kept.best) == np.float32(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience must be an integer of at least 1, got patience=0"),
        ({"patience": 1.5}, "patience must be an integer of at least 1"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta must be finite and at least 0, got min_de"),
        ({"patience": 1, "min_delta": math.nan}, "min_delta must be finite and at least 0"),
        ({"patience": 1, "mode": "auto"}, "mode must be 'min' or 'max', got mode='auto'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        training.early_stopping(**arguments)


def test_flaxs_early_stopping_waits_longer_and_takes_a_first_nan_for_the_best() -> None:
    """The differences that the docstring names."""
    theirs = flax_early_stopping.EarlyStopping(patience=2)
    ours = training.early_stopping(patience=2)
    stops = []
    for values in ((1.0, 1.0, 1.0, 1.0), (math.nan, 3.0, 2.0, 1.0)):
        flaxs, state = theirs, ours.init(None)
        for value in values:
            flaxs, state = flaxs.update(value), ours.update(state, value, None)
            stops.append((flaxs.should_stop, bool(state.stop)))
    waiting = [(False, False), (False, False), (False, True), (True, True)]
    from_nan = [(False, False), (False, False), (False, False), (True, False)]
    assert stops == waiting + from_nan


def test_nothing_need_be_kept() -> None:
    stopping = training.early_stopping(patience=2)
    found, expected = stopping.init(), stopping.init(None)
    for value in (3.0, 4.0, 5.0):
        found, expected = stopping.update(found, value), stopping.update(expected, value, None)
        assert found == expected
    assert bool(found.stop)
    assert found.kept is None


def test_what_was_kept_must_be_given_again() -> None:
    stopping = training.early_stopping(patience=2)
    state = stopping.init({"w": jnp.ones(2)})
    message = "update must be given a tree like the one that init was given, got kept="
    for kept in (None, {"v": jnp.ones(2)}):
        with pytest.raises(ValueError, match=re.escape(message)):
            stopping.update(state, 1.0, kept)


def test_known_arrays_may_be_arguments_in_a_jitted_function() -> None:
    patience, delta = jnp.int32(1), jnp.float32(0.5)

    @jax.jit
    def stops(values: jax.Array) -> jax.Array:
        stopping = training.early_stopping(patience, delta)
        first = stopping.update(stopping.init(), values[0])
        return stopping.update(first, values[1]).stop

    assert [bool(stops(jnp.array([2.0, second]))) for second in (1.6, 1.4)] == [True, False]
    for bad in ((jnp.int32(0), 0.0), (1, jnp.float32(-1)), (jnp.float32(1), 0.0)):
        with pytest.raises(ValueError, match="must be"):
            jax.jit(lambda value, bad=bad: training.early_stopping(*bad).init(value))(1.0)


@pytest.mark.parametrize("value", ["3", None, np.ones(2), 1j, np.str_("3")])
def test_what_is_no_single_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="min_delta must be a single number, got min_delta="):
        training.early_stopping(1, value)
