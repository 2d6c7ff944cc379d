"""The cases of dropout: sound pairs in which a layer or a function of it is used."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import dropout, functional, interop, linear
from flaxstab._typing import Array
from flaxstab.parity._selftest._cases import DROP, affine, drawn, function, layout_of, normal
from flaxstab.parity._selftest._plant import Build, Function, Sides

if TYPE_CHECKING:
    import torch

_INPUTS, _STATES = 3, 5  # of the LSTM


class _Dropped(nnx.Module):
    """Drops, maps and drops again with one layer: its two masks must differ."""

    def __init__(self, lin: nnx.Module, drop: nnx.Module) -> None:
        self.lin, self.drop = lin, drop

    def __call__(self, x: Array) -> Array:
        return self.drop(self.lin(self.drop(x)))


def _twice(
    ours: Callable[[], _Dropped],
    layers: "Callable[[], tuple[torch.nn.Module, torch.nn.Module]]",
    plain: Function,
    x: np.ndarray,
) -> Callable[[], Sides]:
    def classes() -> "tuple[type[torch.nn.Module], type[torch.nn.Module]]":
        import torch

        class Dropped(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin, self.drop = layers()

            def forward(self, x: "torch.Tensor") -> "torch.Tensor":
                return self.drop(self.lin(self.drop(x)))

        class Plain(Dropped):
            def forward(self, x: "torch.Tensor") -> "torch.Tensor":
                y = plain(self.lin, self.drop(x) if self.training else x)
                return self.drop(y) if self.training else y

        return Dropped, Plain

    return Build(
        ours,
        lambda: drawn(classes()[0]()),
        (x,),
        lambda _: drawn(classes()[1]()),
        layout_of(x),
    )


def _dropout() -> Callable[[], Sides]:
    def ours() -> _Dropped:
        rngs = nnx.Rngs(0)
        return _Dropped(linear.Linear(8, 8, rngs=rngs), dropout.Dropout(DROP, rngs=rngs))

    def theirs() -> "tuple[torch.nn.Module, torch.nn.Module]":
        import torch

        return torch.nn.Linear(8, 8), torch.nn.Dropout(DROP)

    return _twice(ours, theirs, affine, normal(16, 8, seed=1))


def _channel_dropout() -> Callable[[], Sides]:
    def ours() -> _Dropped:
        rngs = nnx.Rngs(0)
        return _Dropped(linear.Conv(8, 8, 1, rngs=rngs), dropout.ChannelDropout(DROP, rngs=rngs))

    def theirs() -> "tuple[torch.nn.Module, torch.nn.Module]":
        import torch

        return torch.nn.Conv2d(8, 8, 1), torch.nn.Dropout2d(DROP)

    return _twice(ours, theirs, _pointwise, normal(16, 2, 2, 8, seed=1))


def _pointwise(layer: "torch.nn.Conv2d", x: "torch.Tensor") -> "torch.Tensor":
    import torch

    mixed = torch.einsum("nchw,oc->nohw", x, layer.weight[:, :, 0, 0])
    return mixed + layer.bias[:, None, None]


def _kept(x: "Array | torch.Tensor") -> np.ndarray:
    return np.random.default_rng(5).uniform(size=x.shape) >= DROP


def _masked(x: Array) -> Array:
    return functional.dropout(x, DROP, jnp.asarray(_kept(x)))


def _torch_masked(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    from torch_ref import functional as reference

    return reference.inverted_dropout(x, torch.tensor(_kept(x)).to(x.dtype), DROP)


def _plain_masked(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.where(torch.tensor(_kept(x)), x / (1 - DROP), 0 * x)


def _alpha_masked(x: Array) -> Array:
    return functional.alpha_dropout(x, DROP, jnp.asarray(_kept(x)))


def _torch_alpha_masked(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    from torch_ref import dropout as reference

    return reference.alpha_dropout(x, torch.tensor(_kept(x)).to(x.dtype), DROP)


def _plain_alpha_masked(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    alpha = 1.0507009873554805 * 1.6732632423543772  # SELU's scale and slope
    spread = (1 - DROP) * (1 + DROP * alpha**2)
    return (torch.where(torch.tensor(_kept(x)), x, 0 * x - alpha) + DROP * alpha) / spread**0.5


def _evaluated(x: Array) -> Array:
    """Dropout of every other kind, one behind the other, in evaluation."""
    for layer in (
        dropout.AlphaDropout(DROP),
        dropout.DropPath(DROP),
        dropout.RecurrentDropout(DROP),
    ):
        x = layer(x, deterministic=True, rngs=jax.random.key(0))
    return x


def _torch_evaluated(x: "torch.Tensor") -> "torch.Tensor":
    import torch

    from torch_ref import dropout as reference

    layers = torch.nn.AlphaDropout(DROP), reference.DropPath(DROP), reference.RecurrentDropout(DROP)
    return torch.nn.Sequential(*layers).eval()(x)


def state_mask(size: int) -> np.ndarray:
    """Returns what is kept of the LSTM's state or inputs in the case of it."""
    return np.random.default_rng(size).uniform(size=(8, size)) >= DROP


def _cell() -> dropout.RecurrentDropoutCell:
    """Returns the LSTM's cell, all its parameters drawn anew."""
    inner = nnx.OptimizedLSTMCell(_INPUTS, _STATES, rngs=nnx.Rngs(0))
    cell, rng = dropout.RecurrentDropoutCell(inner, DROP), np.random.default_rng(7)
    tensors = {n: rng.normal(0.5, 1.0, a.shape) for n, a in interop.state_dict(cell).items()}
    interop.load_state_dict(cell, tensors)
    return cell


def _lstm() -> Callable[[], Sides]:
    """An LSTM whose inputs and state are dropped by one mask each."""
    x = normal(8, 3, _INPUTS, seed=1, offset=0.3, scale=0.5)
    return Build(_flax_lstm, _torch_lstm, (x,), _plain_lstm)


def _flax_lstm() -> Callable[[Array], Array]:
    graph, state = nnx.split(_cell())
    kept = state_mask(_INPUTS), state_mask(_STATES)

    def ours(x: Array) -> Array:
        of_inputs, of_states = map(jnp.asarray, kept)
        step = nnx.merge(graph, state, copy=True)
        x = dropout.RecurrentDropout(DROP)(x, mask=of_inputs)
        zeros = jnp.zeros(of_states.shape, x.dtype)
        carry, outputs = step.start((zeros, zeros), mask=of_states), []
        for t in range(x.shape[1]):
            carry, y = step(carry, x[:, t])
            outputs.append(y)
        return jnp.stack(outputs, 1)

    return ours


def _torch_lstm() -> "Callable[[torch.Tensor], torch.Tensor]":
    import torch

    from torch_ref import dropout as reference

    twin = reference.VariationalLSTM(_INPUTS, _STATES, DROP)
    # Back from Flax, which keeps one bias for torch's two.
    twin.load_state_dict({n: torch.tensor(a) for n, a in interop.state_dict(_cell()).items()})
    twin.double()

    def theirs(x: "torch.Tensor") -> "torch.Tensor":
        kept = state_mask(_INPUTS), state_mask(_STATES)
        return twin(x, *(torch.tensor(mask).to(x.dtype) for mask in kept))

    return theirs


def _plain_lstm(_: object) -> "Callable[[torch.Tensor], torch.Tensor]":
    import torch

    weights = {
        n.removeprefix("cell."): torch.tensor(a).double()
        for n, a in interop.state_dict(_cell()).items()
    }
    kept = state_mask(_INPUTS), state_mask(_STATES)

    def plain(x: "torch.Tensor") -> "torch.Tensor":
        scales = [torch.tensor(mask).to(x.dtype) / (1 - DROP) for mask in kept]
        h = c = x.new_zeros(len(x), _STATES)
        outputs = []
        for t in range(x.shape[1]):
            gates = (x[:, t] * scales[0]) @ weights["weight_ih"].T + weights["bias_ih"]
            gates = gates + (h * scales[1]) @ weights["weight_hh"].T + weights["bias_hh"]
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)

    return plain


def dropouts() -> dict[str, Callable[[], Sides]]:
    """Returns the cases, each a function that builds its sides."""
    x = normal(16, 8, seed=1)
    return {
        "dropout": _dropout(),
        "channel dropout": _channel_dropout(),
        "dropout, mask given": function(_masked, _torch_masked, _plain_masked, x),
        "alpha dropout, mask given": function(
            _alpha_masked, _torch_alpha_masked, _plain_alpha_masked, x
        ),
        "dropout in evaluation": function(
            _evaluated, _torch_evaluated, lambda x: x, normal(16, 3, 4, seed=1)
        ),
        "LSTM, masks given": _lstm(),
    }
