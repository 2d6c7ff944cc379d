"""The character model's training run: one jitted step, text and keys on the device."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _jax_side import data_mesh
from _text import Text, windows
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flaxstab import functional, models, optim


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides every number of a run; a checkpoint goes on with the same only.

    Attributes:
      text: the digest of the text.
      characters: how many distinct ones it has.
      width: features of a character.
      depth: number of blocks.
      heads: heads of each attention.
      context: characters that the model sees.
      batch_size: windows per step.
      steps: length of the run.
      learning_rate: its peak, after the warmup.
      dropout: the probability of dropping.
      dtype: 'float32', 'float64', or 'bfloat16' for bfloat16 compute on float32 parameters.
      scan: whether the blocks are one loop.
      remat: whether the backward pass keeps each block's input only.
      seed: of weights, batches, dropout and sampling.
    """

    text: str
    characters: int
    width: int = 96
    depth: int = 4
    heads: int = 4
    context: int = 64
    batch_size: int = 8
    steps: int = 5000
    learning_rate: float = 4e-3
    dropout: float = 0.1
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False
    seed: int = 0
    weight_decay: float = 0.1
    max_norm: float = 1.0

    @property
    def storage(self) -> np.dtype:
        """The dtype of parameters and losses."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    def rate(self) -> optax.Schedule:
        """Returns the learning rate: up over a twentieth of the run, then down to a tenth."""
        peak = self.learning_rate
        return optim.warmup_cosine(peak, self.steps // 20, self.steps, end=peak / 10)


class Step(NamedTuple):
    """What one training step reports."""

    loss: float
    gradient_norm: float
    learning_rate: float


def build(settings: Settings, weights: jax.Array, dropout: jax.Array) -> dict[str, nnx.Module]:
    """Returns model and optimizer, initialised from keys."""
    sizes = models.LMSize(
        d=settings.width, depth=settings.depth, nhead=settings.heads, max_len=settings.context
    )
    model = models.TransformerLM(
        settings.characters,
        sizes,
        p_drop=settings.dropout,
        scan=settings.scan,
        remat=settings.remat,
        dtype=jnp.bfloat16 if settings.dtype == "bfloat16" else None,
        param_dtype=settings.storage,
        rngs=nnx.Rngs(params=weights, dropout=dropout),
    )
    mask = optim.decay_mask(model)
    tx = optax.chain(
        optim.clip_grad_norm(settings.max_norm),
        optim.adamw(settings.rate(), (0.9, 0.99), weight_decay=settings.weight_decay, mask=mask),
    )
    return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}


class LanguageRun:
    """One training run. Nothing but a call crosses from host to device in a step.

    Args:
      settings: the run's settings.
      text: the text, whose digest the settings name.

    Attributes:
      parameters: how many numbers the model learns.
    """

    def __init__(self, settings: Settings, text: Text) -> None:
        self.settings = settings
        self._mesh = data_mesh(settings.batch_size)
        self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec("data"))
        # Four keys for four purposes: one key gives everything else, and none is used twice.
        keys = jax.random.split(jax.random.key(settings.seed), 4)
        weights, dropout, self._order, self._draws = keys
        both = build(settings, weights, dropout)
        learnt = jax.tree.leaves(nnx.state(both["model"], nnx.Param))
        self.parameters = sum(leaf.size for leaf in learnt)
        self._graph, state = nnx.split(both)
        self._state = jax.device_put(state, self._whole)
        self._text = jax.device_put(text.train, self._whole)
        self._valid = windows(text.valid, settings.context, 8 * settings.batch_size)
        # Without out_shardings the second step would find other shardings, and compile again.
        self._step = jax.jit(self._train_step, donate_argnums=0, out_shardings=self._whole)
        self._score = jax.jit(self._scored)
        self._sample = jax.jit(self._sampled, static_argnames="length")

    @property
    def state(self) -> nnx.State:
        """Parameters, keys and counts of dropout, the optimizer's moments and the step."""
        return self._state

    @state.setter
    def state(self, state: nnx.State) -> None:
        self._state = jax.device_put(state, self._whole)

    @property
    def steps_taken(self) -> int:
        """How many steps led to the state."""
        return int(self._state["optimizer"]["step"][...])

    @property
    def devices(self) -> int:
        """How many devices the batches are spread over."""
        return self._mesh.size

    def step(self) -> jax.Array:
        """Starts one training step and returns its report; does not wait for it."""
        self._state, report = self._step(self._state, self._text)
        return report

    def batch(self, step: jax.Array, text: jax.Array) -> jax.Array:
        """Returns a step's windows, one character longer than the context.

        They depend on the seed and the step alone: a run that goes on needs no place in a queue.
        """
        shape, length = (self.settings.batch_size, 1), self.settings.context + 1
        key = jax.random.fold_in(self._order, step)
        starts = jax.random.randint(key, shape, 0, len(text) - length + 1, jnp.int32)
        return text[starts + jnp.arange(length, dtype=jnp.int32)[None]]

    def evaluate(self) -> float:
        """Returns the mean loss over the whole validation part."""
        size = 8 * self.settings.batch_size
        inputs, targets = self._valid
        sums = [
            self._score(self._state, *jax.device_put((inputs[i : i + size], targets[i : i + size]),
                                                     self._split))
            for i in range(0, len(inputs), size)
        ]  # fmt: skip
        loss, count = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        return float(loss / count)

    def sample(self, prompt: np.ndarray, length: int, temperature: float, seed: int) -> np.ndarray:
        """Returns characters that go on from a prompt of one character or more.

        Args:
          prompt: numbers; the last that fit the context count.
          length: how many characters to draw.
          temperature: what the logits are divided by; 0 takes the likeliest.
          seed: of the draws.
        """
        context = self.settings.context
        seen = prompt[-context:]
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        key = jax.random.fold_in(self._draws, seed)
        arguments = (window, np.int32(len(seen)), np.asarray(temperature, self.settings.storage))
        return np.asarray(self._sample(self._state, *arguments, key, length=length))

    def _train_step(self, state: nnx.State, text: jax.Array) -> tuple[nnx.State, jax.Array]:
        both = nnx.merge(self._graph, state)
        model, optimizer = both["model"], both["optimizer"]
        taken = optimizer.step[...]
        batch = jax.lax.with_sharding_constraint(self.batch(taken, text), self._split)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params: nnx.State, rest: nnx.State) -> jax.Array:
            logits = nnx.merge(graph, params, rest)(batch[:, :-1])
            # bfloat16 logits give a bfloat16 loss: two digits.
            logits = logits.astype(self.settings.storage).reshape(-1, self.settings.characters)
            return functional.cross_entropy(logits, batch[:, 1:].reshape(-1))

        loss, grads = nnx.value_and_grad(loss_fn)(params, rest)
        optimizer.update(model, grads)
        norm, rate = optimizer.opt_state[0].norm[...], self.settings.rate()(taken)
        report = jnp.stack([jnp.asarray(x, loss.dtype) for x in (loss, norm, rate)])
        return nnx.state(both), report

    def _scored(self, state: nnx.State, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Returns the sum of the losses, and how many there are."""
        logits = self._still(state)(inputs).astype(self.settings.storage)
        flat = logits.reshape(-1, self.settings.characters), targets.reshape(-1)
        loss = functional.cross_entropy(*flat, reduction="sum")
        return jnp.stack([loss, jnp.sum(targets >= 0).astype(loss.dtype)])

    def _still(self, state: nnx.State) -> nnx.Module:
        """Returns the model in evaluation mode."""
        model = nnx.merge(self._graph, state)["model"]
        model.eval()
        return model

    def _sampled(
        self, state: nnx.State, window: jax.Array, filled: jax.Array, temperature: jax.Array,
        key: jax.Array, *, length: int,
    ) -> jax.Array:  # fmt: skip
        """Draws characters one after the other, in a window of the context's length.

        The window fills up, then moves along. What is behind the last character is not seen: the
        model is causal.
        """
        model = self._still(state)

        def draw(
            carried: tuple[jax.Array, jax.Array], key: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            window, filled = carried
            logits = model(window[None])[0, filled - 1].astype(self.settings.storage)
            drawn = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1))
            number = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
            full = filled == len(window)
            window = jnp.where(full, jnp.roll(window, -1), window)
            filled = jnp.where(full, filled, filled + 1)
            return (window.at[filled - 1].set(number), filled), number

        _, numbers = jax.lax.scan(draw, (window, filled), jax.random.split(key, length))
        return numbers
