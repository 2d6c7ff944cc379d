"""A few draws of every random function: do the same seeds still give the same numbers?"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import attention, dropout, initializers
from flaxstab._typing import Array
from flaxstab.parity._inputs import Values
from flaxstab.parity._record._baseline import Mark
from flaxstab.parity._replay import drawn_by

_SIZE = (4, 8)
_INITIALIZERS = (
    "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "lecun_normal", "lecun_uniform",
    "normal", "orthogonal", "truncated_normal", "uniform",
)  # fmt: skip
_OURS = ("kaiming_normal", "kaiming_uniform", "orthogonal", "trunc_normal", "xavier_uniform")

Draw = Callable[[], object]
Keyed = Callable[[Array], Array]  # of a key


def streams(*, torch_too: bool) -> tuple[dict[str, np.ndarray], tuple[Mark, ...]]:
    """Returns draws by name, and the names of what could not be called, with the reason.

    The draws themselves are kept, not a hash: that the last digit of a normal number has moved is
    no other stream.

    Args:
      torch_too: whether PyTorch is there to be asked.
    """
    found, failed = _drawn(_jax())
    with jax.enable_x64(True):
        wide, fails = _drawn(_jax_wide())
    found, failed = found | wide, failed | fails
    for name, draw in (_flax() | (_torch() if torch_too else {})).items():
        try:
            found[name] = np.asarray(draw())
        except Exception as error:  # a function that is gone is a result
            failed[name] = _said(error)
    return found, tuple(Mark(name, words) for name, words in failed.items())


def _drawn(draws: Mapping[str, Keyed]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Draws all in one program, which takes a third of the time to compile."""
    key, good, failed = jax.random.key(0), dict[str, Keyed](), dict[str, str]()
    for name, draw in draws.items():
        try:
            jax.eval_shape(draw, key)
            good[name] = draw
        except Exception as error:  # a function that is gone is a result
            failed[name] = _said(error)

    def together(key: Array) -> dict[str, Array]:
        return {name: draw(key) for name, draw in good.items()}

    return {name: np.asarray(a) for name, a in jax.jit(together)(key).items()}, failed


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def torchs(values: Values) -> dict[str, np.ndarray]:
    """Returns PyTorch's streams among all."""
    return {name: array for name, array in values.items() if name.startswith("torch.")}


def _keyed(name: str, *arguments: object, **options: object) -> Keyed:
    return lambda key: getattr(jax.random, name)(key, *arguments, **options)


def _jax() -> dict[str, Keyed]:
    plain = (
        "bits", "cauchy", "exponential", "gumbel", "laplace", "logistic", "normal", "rademacher",
        "uniform",
    )  # fmt: skip
    chosen: dict[str, Keyed] = {name: _keyed(name, shape=_SIZE) for name in plain}
    chosen |= {
        "bernoulli": _keyed("bernoulli", 0.25, _SIZE),
        "categorical": _keyed("categorical", np.log(np.arange(1, 9, dtype=np.float32)), shape=(8,)),
        "choice": _keyed("choice", 16, _SIZE),
        "gamma": _keyed("gamma", 2.0, _SIZE),
        "permutation": _keyed("permutation", 32),
        "randint": _keyed("randint", _SIZE, 0, 1000),
        "randint of uint8": _keyed("randint", _SIZE, 0, 100, dtype=np.uint8),
        "truncated_normal": _keyed("truncated_normal", -2.0, 2.0, _SIZE),
        "split": lambda key: jax.random.key_data(jax.random.split(key, 4)),
        "fold_in": lambda key: jax.random.key_data(jax.random.fold_in(key, 7)),
    }
    found = {f"jax.random.{name}": draw for name, draw in chosen.items()}
    for name in _INITIALIZERS:
        found[f"jax.nn.initializers.{name}"] = _initializer(jax.nn.initializers, name)
    for name in _OURS:
        found[f"flaxstab.initializers.{name}"] = _initializer(initializers, name)
    return found


def _jax_wide() -> dict[str, Keyed]:
    names = "normal", "uniform"
    return {f"jax.random.{n} in float64": _keyed(n, shape=_SIZE, dtype=np.float64) for n in names}


def _initializer(module: object, name: str) -> Keyed:
    return lambda key: getattr(module, name)()(key, (8, 4), jnp.float32)


def _flax() -> dict[str, Draw]:
    def masks(make: Callable[[nnx.Rngs], nnx.Module]) -> Draw:
        def draw() -> object:
            layer = make(nnx.Rngs(0))
            layer.train()
            (found,) = drawn_by(layer).values()
            return found

        return draw

    return {
        "nnx.Rngs": lambda: jax.random.key_data(nnx.Rngs(0).params()),
        "nnx.Rngs, a stream of its own": lambda: jax.random.key_data(nnx.Rngs(noise=0).noise()),
        "nnx.Dropout": masks(lambda rngs: nnx.Dropout(0.25, rngs=rngs)),
        "nnx.Linear": lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)).kernel[...],
        "flaxstab.Dropout": masks(lambda rngs: dropout.Dropout(0.25, rngs=rngs)),
        "flaxstab.ChannelDropout": masks(lambda rngs: dropout.ChannelDropout(0.25, rngs=rngs)),
        "flaxstab.DropPath": masks(lambda rngs: dropout.DropPath(0.25, rngs=rngs)),
        "flaxstab.MultiHeadAttention": masks(
            lambda rngs: attention.MultiHeadAttention(4, 2, 0.25, rngs=rngs)
        ),
    }


def _torch() -> dict[str, Draw]:
    import torch

    def seeded(draw: Draw) -> Draw:
        def drawn() -> object:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                return torch.as_tensor(draw()).numpy()

        return drawn

    def filled(name: str, *arguments: object) -> Draw:
        return lambda: getattr(torch.nn.init, name)(torch.empty(8, 4), *arguments)

    draws: Mapping[str, Draw] = {
        "rand": lambda: torch.rand(_SIZE),
        "rand in float64": lambda: torch.rand(_SIZE, dtype=torch.float64),
        "randn": lambda: torch.randn(_SIZE),
        "randint": lambda: torch.randint(0, 1000, _SIZE),
        "randperm": lambda: torch.randperm(32),
        "bernoulli": lambda: torch.bernoulli(torch.full(_SIZE, 0.25)),
        "multinomial": lambda: torch.multinomial(torch.arange(1.0, 9.0), 4),
        "normal": lambda: torch.normal(0.0, 1.0, _SIZE),
        "poisson": lambda: torch.poisson(torch.full(_SIZE, 3.0)),
        "nn.functional.dropout": lambda: torch.nn.functional.dropout(torch.ones(_SIZE), 0.25),
        "nn.Linear": lambda: torch.nn.Linear(8, 4).weight,
        "nn.Conv2d": lambda: torch.nn.Conv2d(2, 4, 2).weight,
        "nn.Embedding": lambda: torch.nn.Embedding(8, 4).weight,
        "nn.MultiheadAttention": lambda: torch.nn.MultiheadAttention(4, 2).in_proj_weight,
        "nn.init.kaiming_normal_": filled("kaiming_normal_"),
        "nn.init.kaiming_uniform_": filled("kaiming_uniform_"),
        "nn.init.normal_": filled("normal_"),
        "nn.init.orthogonal_": filled("orthogonal_"),
        "nn.init.trunc_normal_": filled("trunc_normal_"),
        "nn.init.uniform_": filled("uniform_"),
        "nn.init.xavier_normal_": filled("xavier_normal_"),
        "nn.init.xavier_uniform_": filled("xavier_uniform_"),
    }
    return {f"torch.{name}": seeded(draw) for name, draw in draws.items()}
