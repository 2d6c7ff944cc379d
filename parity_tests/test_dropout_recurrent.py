"""One mask for a whole sequence: of its inputs, step by step, and of a cell's state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop
from flaxstab._typing import Array
from flaxstab.dropout import RecurrentDropout, RecurrentDropoutCell
from flaxstab.functional import dropout_mask
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from torch_ref import dropout as torch_dropout

N, T, C, H = 6, 5, 3, 8
P = 0.4
KEY = jax.random.key(7)
X = jnp.asarray(values(N, T, C), jnp.float32)
CELLS = {
    "LSTM": nnx.LSTMCell,
    "optimized LSTM": nnx.OptimizedLSTMCell,
    "GRU": nnx.GRUCell,
    "simple": nnx.SimpleCell,
}


def dropped(cell: str = "optimized LSTM", p: float = P, **options: object) -> RecurrentDropoutCell:
    inner = CELLS[cell](C, H, rngs=nnx.Rngs(0), **options)
    return RecurrentDropoutCell(inner, p, rngs=nnx.Rngs(dropout=1))


def test_a_sequence_is_dropped_as_its_twin_does_with_its_mask() -> None:
    """The mask is read off the twin's output: the input has no zeros."""
    torch.manual_seed(0)
    x = torch.tensor(values(N, T, C))
    theirs = torch_dropout.RecurrentDropout(P)(x)
    mask = jnp.asarray(theirs[:, 0].numpy() != 0)
    with jax.enable_x64(True):
        for given in (mask, mask[:, None]):
            assert_same(RecurrentDropout(P)(jnp.asarray(x.numpy()), mask=given), theirs)
        step = RecurrentDropout(P)(jnp.asarray(x[:, 2].numpy()), mask=mask)
        assert_same(step, theirs[:, 2])
    assert 0 < mask.sum() < mask.size


@pytest.mark.parametrize("scan", ["jax.lax.scan", "nnx.scan"])
def test_steps_in_a_scan_drop_what_the_whole_sequence_does(scan: str) -> None:
    layer = RecurrentDropout(P, rngs=nnx.Rngs(0))
    key = layer.next_key()
    whole = layer(X, rngs=key)
    if scan == "nnx.scan":

        @nnx.scan(in_axes=(None, None, 1), out_axes=1)
        def run(layer: RecurrentDropout, key: Array, x: Array) -> Array:
            return layer(x, rngs=key)

        steps = run(layer, key, X)
    else:
        _, stacked = jax.lax.scan(lambda c, x: (c, layer(x, rngs=key)), None, X.swapaxes(0, 1))
        steps = stacked.swapaxes(0, 1)
    np.testing.assert_array_equal(steps, whole)
    assert bool((whole == 0).any())
    assert int(layer.rngs.count[...]) == 1


def test_other_numbers_of_axes_are_refused() -> None:
    for shape in ((3,), (2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"needs \(N, T, C\) or one step \(N, C\), got shape="):
            RecurrentDropout(P, rngs=nnx.Rngs(0))(jnp.ones(shape))


def variational(cell: RecurrentDropoutCell, x: Array, masks: tuple[Array, Array]) -> Array:
    """The twin's sequence: masked inputs, and a state masked by the cell."""
    x = RecurrentDropout(cell.drop.p)(x, mask=masks[0])
    zeros = jnp.zeros((N, H), x.dtype)
    return nnx.RNN(cell)(x, initial_carry=cell.start((zeros, zeros), mask=masks[1]))


@pytest.mark.parametrize("kind", ["LSTM", "optimized LSTM"])
def test_an_lstm_with_its_twins_masks_and_weights_is_the_twin(kind: str) -> None:
    """Outputs, and gradients of the input and of every weight, in float64."""
    torch.manual_seed(0)
    twin, x = torch_dropout.VariationalLSTM(C, H, P).double(), torch.tensor(values(N, T, C))
    masks = [x.new_empty(N, size).bernoulli_(1 - P) for size in (C, H)]
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    x.requires_grad_(True)
    expected = twin(x, *masks)
    cotangent = values(N, T, H, seed=1)
    gradients = torch.autograd.grad(expected, [x, *twin.parameters()], torch.tensor(cotangent))
    with jax.enable_x64(True):
        cell = dropped(kind, param_dtype=jnp.float64)
        interop.load_state_dict(cell, {n: t.detach().numpy() for n, t in twin.state_dict().items()})
        graph, params, rest = nnx.split(cell, nnx.Param, ...)
        given = tuple(jnp.asarray(mask.numpy() != 0) for mask in masks)

        @jax.jit
        def run(params: nnx.State, x: Array) -> object:
            output, pullback = jax.vjp(
                lambda params, x: variational(nnx.merge(graph, params, rest, copy=True), x, given),
                params, x,
            )  # fmt: skip
            return output, pullback(jnp.asarray(cotangent))

        output, (of_params, of_x) = run(params, jnp.asarray(x.detach().numpy()))
        assert_same(output, expected)
        size = N * T * np.abs(cotangent).max()  # gradients of weights sum over batch and time
        assert_same(of_x, gradients[0], size)
        nnx.update(cell, of_params)
        found = interop.state_dict(cell)
        for (name, _), theirs in zip(twin.named_parameters(), gradients[1:], strict=True):
            if "bias_hh" not in name:  # torch's second bias, whose gradient is the first one's
                assert_same(found[name], theirs, size)


def test_in_evaluation_the_cell_is_the_cell_alone() -> None:
    cell = dropped()
    alone = nnx.RNN(cell.cell)(X)
    assert bool((nnx.RNN(cell)(X) != alone).any())
    cell.eval()
    np.testing.assert_array_equal(nnx.RNN(cell)(X), alone)
    assert cell.start(jnp.zeros(2))[1] is None
    np.testing.assert_array_equal(nnx.RNN(dropped(p=0.0))(X), alone)


def loop(cell: RecurrentDropoutCell, mask: Array) -> Array:
    """The recurrence with a mask of the state before every step."""
    carry, outputs = cell.cell.initialize_carry((N, C), nnx.Rngs(0)), []
    for step in range(T):
        state = carry if isinstance(carry, tuple) else (carry,)
        state = (*state[:-1], state[-1] * (mask / (1 - P)))
        carry, y = cell.cell(state if isinstance(carry, tuple) else state[0], X[:, step])
        outputs.append(y)
    return jnp.stack(outputs, 1)


@pytest.mark.parametrize("kind", ["optimized LSTM", "GRU"])  # a carry of two arrays, and of one
def test_every_step_of_a_sequence_has_one_mask_and_every_sequence_its_own(kind: str) -> None:
    cell, twin = dropped(kind), RecurrentDropout(P, rngs=nnx.Rngs(dropout=1))
    outputs = []
    for _ in range(2):
        outputs.append(nnx.RNN(cell)(X))
        mask = jnp.asarray(dropout_mask(twin.next_key(), P, (N, H)), jnp.float32)
        gap = jnp.abs(outputs[-1] - loop(cell, mask)).max()
        assert gap <= 64 * np.finfo(np.float32).eps  # five steps of numbers below 1
    assert bool((outputs[0] != outputs[1]).any())


def test_the_key_travels_with_the_carry() -> None:
    """A sequence that is cut in two keeps its mask, also where the last step differs by sample."""
    rnn = nnx.RNN(dropped(), return_carry=True)
    _, whole = rnn(X)
    rnn = nnx.RNN(dropped(), return_carry=True)
    carry, first = rnn(X[:, :3])
    _, second = rnn(X[:, 3:], initial_carry=carry)
    np.testing.assert_array_equal(jnp.concatenate([first, second], 1), whole)
    rnn = nnx.RNN(dropped(), return_carry=True)
    lengths = jnp.array([3, 3, 2, 3, 1, 3])
    carry, _ = rnn(X, seq_lengths=lengths)
    _, second = rnn(X[:, 3:], initial_carry=carry)
    full = np.asarray(lengths) == 3
    np.testing.assert_array_equal(np.asarray(second)[full], np.asarray(whole)[full, 3:])


def test_a_key_at_the_start_of_a_sequence_overrides_the_stream() -> None:
    for key in (KEY, jax.random.PRNGKey(7)):
        cell = dropped()
        start = cell.start(cell.cell.initialize_carry((N, C), nnx.Rngs(0)), rngs=key)
        (_, found), _ = cell(start, X[:, 0])
        assert found.shape == (1, *key.shape)
        assert int(cell.drop.rngs.count[...]) == 0
    own = nnx.RNN(dropped())(X, initial_carry=start)
    mask = jnp.asarray(dropout_mask(KEY, P, (N, H)), jnp.float32)
    assert jnp.abs(own - loop(dropped(), mask)).max() <= 64 * np.finfo(np.float32).eps


def test_an_lstm_keeps_the_key_more_than_without_dropout() -> None:
    """One key however long the sequence; its states are kept either way."""

    def kept(p: float) -> int:
        graph, params, rest = nnx.split(nnx.RNN(dropped(p=p)), nnx.Param, ...)

        def run(params: nnx.State, x: Array) -> Array:
            return nnx.merge(graph, params, rest, copy=True)(x)

        _, pullback = jax.vjp(jax.jit(run), params, X)
        leaves = jax.tree.leaves(pullback)
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, jax.Array))

    assert 0 < kept(P) - kept(0.0) <= 16


@pytest.mark.parametrize(
    "carry", [(jnp.zeros((N, H)), jnp.zeros((N, H))), jnp.zeros((2, H)), (jnp.zeros((N, H)),)]
)
def test_a_carry_without_a_key_is_refused(carry: object) -> None:
    with pytest.raises(ValueError, match=r"a carry must be \(the cell's carry, key\), got .*start"):
        dropped()(carry, X[:, 0])


def test_a_sequence_begun_in_evaluation_is_refused_in_training() -> None:
    cell = dropped()
    cell.eval()
    carry, _ = cell(cell.initialize_carry((N, C), nnx.Rngs(0)), X[:, 0])
    cell.train()
    with pytest.raises(ValueError, match="a sequence in training must begin in training, got key="):
        cell(carry, X[:, 0])


def test_an_initial_state_can_be_drawn() -> None:
    cell = dropped("simple")
    (inner, _) = cell.initialize_carry((N, C), nnx.Rngs(3), nnx.initializers.ones)
    np.testing.assert_array_equal(inner, jnp.ones((N, H)))
    assert cell.num_feature_axes == 1
