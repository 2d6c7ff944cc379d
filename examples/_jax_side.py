"""The mini project in JAX: flaxstab's layers and optimizer, one jitted step, data on the device."""

import copy
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Cifar10
from _plan import Evaluation, Gap, Plan, Step
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxstab import functional, models, optim

TEST_BATCH = 250


Update = Callable[[nnx.Module, optax.Schedule, float], optax.GradientTransformation]


def masked_adamw(
    model: nnx.Module, rate: optax.Schedule, decay: float
) -> optax.GradientTransformation:
    """Returns the mini project's optimizer: AdamW that decays weights alone."""
    return optim.adamw(rate, weight_decay=decay, mask=optim.decay_mask(model))


def build(plan: Plan, update: Update = masked_adamw) -> tuple[nnx.Module, nnx.Optimizer]:
    """Returns the model and its optimizer, initialised from the plan's seed.

    Args:
      plan: the run's settings.
      update: makes what follows the clipping of the model, the learning rate and the decay.
    """
    model = models.StableCNN(
        plan.norm,
        plan.act,
        widths=plan.widths,
        groups=plan.groups,
        drop=plan.drop,
        dtype=jnp.bfloat16 if plan.dtype == "bfloat16" else None,
        param_dtype=plan.storage,
        rngs=nnx.Rngs(plan.seed),
    )
    rate = optim.warmup_cosine(plan.learning_rate, plan.warmup_steps, plan.total_steps)
    tx = optax.chain(optim.clip_grad_norm(plan.max_norm), update(model, rate, plan.weight_decay))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def data_mesh(batch_size: int) -> Mesh:
    """Returns a mesh over as many devices as divide the batch evenly."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.array(devices[:count]), ("data",))


class JaxRun:
    """One training run. Nothing but a call crosses from host to device in a step.

    Args:
      plan: the run's settings.
      data: normalised images and labels.
      update: as of :func:`build`.
    """

    def __init__(self, plan: Plan, data: Cifar10, update: Update = masked_adamw) -> None:
        self.plan = plan
        self.gaps: list[Gap] = []
        mesh = data_mesh(plan.batch_size)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._data = jax.device_put(data, self._whole)
        self._rate = optim.warmup_cosine(plan.learning_rate, plan.warmup_steps, plan.total_steps)
        self._graph, state = nnx.split(build(plan, update))
        self._state = jax.device_put(state, self._whole)
        # The position in the epoch's order and the steps' reports live on the device, too.
        self._reports = self._put(np.zeros((plan.steps_per_epoch, 4), plan.storage))
        self._order, self._position = self._put(np.zeros(1, np.int32)), self._put(np.int32(0))
        # Without out_shardings the second step would find other shardings, and compile again.
        self._step = jax.jit(self._train_step, donate_argnums=0, out_shardings=self._whole)
        self._evaluate = jax.jit(self._evaluate_batch)

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._whole)

    @property
    def model(self) -> nnx.Module:
        """A copy of the model as it is now."""
        return nnx.merge(self._graph, self._state, copy=True)[0]

    @property
    def optimizer(self) -> nnx.Optimizer:
        """A copy of the optimizer as it is now."""
        return nnx.merge(self._graph, self._state, copy=True)[1]

    @property
    def devices(self) -> int:
        """How many devices the batches are spread over."""
        return self._split.mesh.size

    def perturbed(self, relative: float) -> "JaxRun":
        """Returns a copy, which shares the compiled step, with every weight moved up or down."""
        rng = np.random.default_rng(self.plan.seed)

        def moved(weight: jax.Array) -> jax.Array:
            signs = rng.choice([-relative, relative], weight.shape)
            return weight * jnp.asarray(1 + signs, weight.dtype)

        other = copy.copy(self)
        model, optimizer = nnx.merge(self._graph, jax.tree.map(jnp.copy, self._state))
        weights = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(moved, weights))
        other._state = jax.device_put(nnx.state((model, optimizer)), self._whole)
        other._reports = jnp.copy(self._reports)
        return other

    def start_epoch(self, order: np.ndarray) -> None:
        """Sends the order of the epoch's samples to the device."""
        self._order, self._position = self._put(order), self._put(np.int32(0))

    def step(self) -> None:
        """Starts one training step; does not wait for it."""
        carried = (self._state, self._position, self._reports)
        self._state, self._position, self._reports = self._step(carried, self._order, self._data)

    def reports(self, start: int, stop: int) -> list[Step]:
        """Waits for the epoch's steps ``start`` to ``stop`` and returns what they reported."""
        return [Step(*map(float, row)) for row in np.asarray(self._reports)[start:stop]]

    def evaluate(self) -> Evaluation:
        """Returns loss and accuracy on the test set, by the running statistics."""
        model = self.model
        model.eval()
        images, labels = self._data.test_images, self._data.test_labels
        sums = [
            self._evaluate(model, images[i : i + TEST_BATCH], labels[i : i + TEST_BATCH])
            for i in range(0, len(labels), TEST_BATCH)
        ]
        loss, correct = np.sum(jax.device_get(sums), axis=0, dtype=np.float64) / len(labels)
        return Evaluation(float(loss), float(correct))

    def _train_step(
        self,
        carried: tuple[nnx.State, jax.Array, jax.Array],
        order: jax.Array,
        data: Cifar10,
    ) -> tuple[nnx.State, jax.Array, jax.Array]:
        state, position, reports = carried
        size = self.plan.batch_size
        chosen = jax.lax.dynamic_slice_in_dim(order, position * size, size)
        images, labels = jax.lax.with_sharding_constraint(
            (data.train_images[chosen], data.train_labels[chosen]), self._split
        )
        model, optimizer = nnx.merge(self._graph, state)
        rate = self._rate(optimizer.step[...])
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params: nnx.State, rest: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graph, params, rest)(images)
            # bfloat16 logits give a bfloat16 loss: two digits.
            logits = logits.astype(self.plan.storage)
            smoothing = self.plan.label_smoothing
            return functional.cross_entropy(logits, labels, label_smoothing=smoothing), logits

        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(params, rest)
        optimizer.update(model, grads)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        norm = optimizer.opt_state[0].norm[...]
        report = jnp.stack([jnp.asarray(x, reports.dtype) for x in (loss, accuracy, norm, rate)])
        return nnx.state((model, optimizer)), position + 1, reports.at[position].set(report)

    @staticmethod
    def _evaluate_batch(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model(images).astype(jnp.float32)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return jnp.stack([loss, jnp.sum(jnp.argmax(logits, -1) == labels).astype(jnp.float32)])
