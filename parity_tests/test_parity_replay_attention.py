"""PyTorch's attention drops the very probabilities that the Flax layer drops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional as torch_functional

from flaxstab import interop, parity
from flaxstab.attention import MultiHeadAttention
from parity_tests.support.cases import values
from parity_tests.support.layers import assert_same
from parity_tests.support.pairs import refusal

E, H, P, S = 8, 2, 0.3, 255  # keys: see "test_attention_layer"
X, MEMORY = values(2, 3, E, scale=1.0), values(2, S, E, seed=1, scale=1.0)
PADDING = np.arange(S)[None] >= np.array([[S], [S - 100]])


class Twice(nnx.Module):
    """One layer called twice: its masks must differ."""

    def __init__(self, p: float = P, *, need_weights: bool = False, **options: object) -> None:
        self.attn = MultiHeadAttention(E, H, p, **options, rngs=nnx.Rngs(0))
        self.need_weights = need_weights

    def __call__(self, x: jax.Array, memory: jax.Array, padding: jax.Array) -> object:
        options = {"key_padding_mask": padding, "need_weights": self.need_weights}
        first = self.attn(x, memory, **options)
        return self.attn(first[0] if self.need_weights else first, memory, **options)


class TorchTwice(torch.nn.Module):
    def __init__(self, p: float = P, *, need_weights: bool = False, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = torch.nn.MultiheadAttention(E, H, p, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> object:
        options = {"key_padding_mask": padding, "need_weights": self.need_weights}
        first, _ = self.attn(x, memory, memory, **options)
        found = self.attn(first, memory, memory, **options)
        return found if self.need_weights else found[0]


def in_float64(model: nnx.Module, tensors: dict[str, Tensor]) -> nnx.Module:
    """Both sides' weights, in float64 (inside ``enable_x64``)."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    model = nnx.merge(graph, wide, rest)
    interop.load_state_dict(model, tensors)
    return model


@pytest.mark.parametrize("p", [P, 1.0])
@pytest.mark.parametrize("need_weights", [False, True], ids=["without weights", "with weights"])
@pytest.mark.parametrize("added", [False, True], ids=["plain", "added keys"])
def test_masks_are_replayed(need_weights: bool, added: bool, p: float) -> None:
    """With ``dropout`` and ``scaled_dot_product_attention``, and S or S + 2 keys."""
    options = {"need_weights": need_weights, "add_bias_kv": added, "add_zero_attn": added}
    theirs = TorchTwice(p, **options).double()
    x, memory = (torch.tensor(a, requires_grad=True) for a in (X, MEMORY))
    with jax.enable_x64(True):
        ours = in_float64(Twice(p, **options), theirs.state_dict())
        with parity.replayed(ours, theirs) as draws:
            expected = theirs(x, memory, torch.tensor(PADDING))
        found = ours(jnp.asarray(X), jnp.asarray(MEMORY), jnp.asarray(PADDING))
    assert not draws.repeated
    pairs = zip(found, expected, strict=True) if need_weights else [(found, expected)]
    for a, b in pairs:
        assert_same(a, b)
    if need_weights:
        dropped = float((expected[1] == 0).double().mean())
        assert dropped == 1 if p == 1 else dropped > 0.1


def test_a_comparison_replays_gradients_and_steps_too() -> None:
    """A mask of booleans is among the inputs."""
    report = parity.compare(Twice(), TorchTwice(), X, MEMORY, PADDING, dtypes=())
    assert report.passed, str(report)
    assert report.notes == ()


def test_functions_are_exchanged_in_training_alone_and_given_back() -> None:
    ours, theirs = Twice(), TorchTwice()
    given = [torch.tensor(a, dtype=torch.float32) for a in (X, MEMORY)]
    padding, names = torch.tensor(PADDING), ("dropout", "scaled_dot_product_attention")
    before = [vars(torch_functional)[name] for name in names]

    def unchanged() -> bool:
        return all(vars(torch_functional)[n] is f for n, f in zip(names, before, strict=True))

    with parity.replayed(ours, theirs) as draws:
        with pytest.raises(AssertionError, match="embedding dimension of 8"):
            theirs(given[0][..., :5], given[1], padding)
        assert unchanged()
        theirs(*given, padding)
        assert unchanged()
        theirs.eval()
        quiet = [theirs(*given, padding) for _ in range(2)]
    assert torch.equal(*quiet)
    theirs.train()
    assert not torch.equal(*(theirs(*given, padding) for _ in range(2)))
    assert not draws.repeated


class Stock(nnx.Module):
    def __init__(self) -> None:
        self.attn = nnx.MultiHeadAttention(H, E, dropout_rate=P, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array, memory: jax.Array, padding: jax.Array) -> jax.Array:
        return self.attn(x, memory, mask=~padding[:, None, None])


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (lambda: Twice(0.2), TorchTwice, "of probability 0.3 and MultiHeadAttention of .* 0.2"),
        (Twice, lambda: TorchTwice(0.0), "of probability 0.0 and MultiHeadAttention of .* 0.3"),
        (Stock, TorchTwice, "of probability 0.3 and MultiHeadAttention of probability 0.0"),
    ],
    ids=["another", "none", "stock"],
)
def test_another_probability_or_layer_is_refused(ours: object, theirs: object, words: str) -> None:
    rule = (
        "every torch.nn.MultiheadAttention with dropout must have a flaxstab MultiHeadAttention "
        "of its name and probability, got 'attn': MultiheadAttention "
    )
    with (
        pytest.raises(ValueError, match=rule + words),
        parity.replayed(ours(), theirs()),
    ):
        pass


def test_dropout_in_attention_beside_a_function_is_refused() -> None:
    given = (X, MEMORY, PADDING)
    message = refusal(lambda: parity.compare(lambda *a: a[0], TorchTwice(), *given, weights=None))
    assert "dropout is replayed for NNX modules only" in message
    assert "'attn': MultiheadAttention" in message


def test_every_combination_of_functions_is_met() -> None:
    """What the exchange rests on: PyTorch's attention calls one of the two, by these names."""
    called = []
    for name, need_weights in itertools.product(
        ("dropout", "scaled_dot_product_attention"), (0, 1)
    ):
        original = vars(torch_functional)[name]

        def spy(
            *args: object, name: str = name, original: object = original, **o: object
        ) -> object:
            called.append((name, need_weights))  # noqa: B023 (called at once)
            return original(*args, **o)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_functional, name, spy)
            module = torch.nn.MultiheadAttention(4, 2, 0.1)
            module(*(torch.ones(3, 1, 4),) * 3, need_weights=bool(need_weights))
    assert called == [("dropout", 1), ("scaled_dot_product_attention", 0)]
