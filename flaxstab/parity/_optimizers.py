"""An optax transformation beside a torch optimizer, on the same gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, PyTree
from flaxstab.parity._inputs import Values, is_float, own_rng, round_to
from flaxstab.parity._lockstep import STEPS, Batch, Watch, lockstep, updates
from flaxstab.parity._optimizer_state import jax_state, torch_state, unnamed
from flaxstab.parity._place import located
from flaxstab.parity._precision import EXACT, Precision
from flaxstab.parity._recorded import RecordedSteps
from flaxstab.parity._replay import Draws
from flaxstab.parity._report import Report, Tolerance
from flaxstab.parity._torch_side import numpy_of, torch_dtype, torch_tensor

if TYPE_CHECKING:
    import torch

    Factory = Callable[[list[torch.nn.Parameter]], object]

# Gradients of every size: tiny ones show where eps is added, large ones overflow in float16.
_SCALES = (1.0, 0.5, 1e-2, 1e-6, 1.0, 1e2, 1.0, 1e-4, 10.0, 0.1)


def compare_optimizers(
    tx: optax.GradientTransformation,
    factory: PyTree,
    inputs: Sequence[np.ndarray],
    *,
    dtypes: Sequence[DTypeLike],
    tolerances: tuple[Tolerance, ...],
    witness: PyTree,
    seed: int,
    watch: Watch | None = None,
) -> Report:
    """Compares updates, parameters and state after each of 10 steps; see :func:`compare`."""
    check(
        len(inputs) > 0 and all(is_float(a) for a in inputs),
        "inputs must be the initial parameters, floating-point arrays",
        inputs=[str(a.dtype) for a in inputs],
    )
    given = [factory] if witness is None else [factory, witness]
    theirs, *others = (_torch(one, inputs) for one in given)
    return lockstep(
        _Optax(tx, inputs, applies=theirs.applies()),
        theirs,
        gradients(inputs, seed),
        dtypes=dtypes,
        tolerances=tolerances,
        witness=others[0] if others else None,
        watch=watch,
    )


def _torch(factory: PyTree, inputs: Sequence[np.ndarray]) -> "_Torch | RecordedSteps":
    """Returns PyTorch's side, which runs or was recorded."""
    if isinstance(factory, RecordedSteps):
        return factory
    import torch

    check(
        callable(factory) and not isinstance(factory, torch.nn.Module),
        "torch_side of an optax transformation must make a torch.optim.Optimizer of parameters",
        torch_side=type(factory).__name__,
        fix="Pass lambda ps: torch.optim.AdamW(ps, lr=1e-3).",
    )
    return _Torch(factory, inputs)


def gradients(inputs: Sequence[np.ndarray], seed: int) -> Iterator[Batch]:
    rng = own_rng(seed)
    for scale in _SCALES[:STEPS]:
        yield tuple(scale * rng.normal(0.1, 1.0, a.shape) for a in inputs)


class _Optax:
    """A transformation with its parameters and state."""

    def __init__(
        self, tx: optax.GradientTransformation, inputs: Sequence[np.ndarray], *, applies: bool
    ) -> None:
        self._tx, self._inputs, self._applies = tx, inputs, applies

    def start(self, precision: Precision) -> PyTree:
        params = [
            jnp.asarray(round_to(a, precision.stored), precision.compute) for a in self._inputs
        ]
        return params, self._tx.init(params)

    def advance(self, state: PyTree, batch: list[Array]) -> tuple[dict[str, Array], PyTree]:
        params, inner = state
        changes, inner = self._tx.update(batch, inner, params)
        if self._applies:
            return {}, (optax.apply_updates(params, changes), inner)
        return {f"gradient {i}": a for i, a in enumerate(changes)}, (params, inner)

    def unnamed(self, state: PyTree) -> list[str]:
        return unnamed(state[1])

    def named(self, state: PyTree) -> Values:
        params, inner = state
        found: dict[str, PyTree] = jax_state(
            inner, lambda tree: {str(i): a for i, a in _items(tree)}
        )
        if self._applies:
            found |= {f"param {i}": a for i, a in enumerate(params)}
        return {name: np.asarray(a) for name, a in found.items()}


def _items(tree: PyTree) -> Iterator[tuple[int, Array]]:
    """Yields the arrays of a list of parameters with their places; masked ones are left out."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path[0].idx, leaf


class _Torch:
    """A torch optimizer, or a function that changes gradients in place, on the same parameters."""

    def __init__(self, factory: "Factory", inputs: Sequence[np.ndarray]) -> None:
        self._factory, self._inputs = factory, inputs
        self.optional: set[str] = set()
        self.draws = Draws()  # none

    def parameters(self, precision: Precision) -> "list[torch.nn.Parameter]":
        import torch

        kind = torch_dtype(precision.compute)
        arrays = [torch_tensor(round_to(a, precision.stored)).to(kind) for a in self._inputs]
        params = [torch.nn.Parameter(a) for a in arrays]
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        return params

    def applies(self) -> bool:
        """Whether the factory makes an optimizer, rather than changing gradients."""
        import torch

        with located("PyTorch", None, tuple(self._inputs)):
            made = self._factory(self.parameters(EXACT))
        return isinstance(made, torch.optim.Optimizer)

    def start(self, precision: Precision) -> Callable[[Batch, PyTree], Values]:
        import torch

        params = self.parameters(precision)
        made = self._factory(params)
        optimizer = made if isinstance(made, torch.optim.Optimizer) else None
        names = {p: str(i) for i, p in enumerate(params)}

        def copied() -> dict[str, np.ndarray]:
            return {f"param {i}": numpy_of(p).copy() for p, i in names.items()}

        def step(batch: Batch, _: PyTree) -> Values:
            for parameter, gradient in zip(params, batch, strict=True):
                parameter.grad = torch_tensor(gradient).to(parameter.dtype)
            if optimizer is None:
                self._factory(params)
                return {f"gradient {i}": numpy_of(p.grad) for i, p in enumerate(params)}
            before = copied()
            optimizer.step()
            found = copied()
            state = torch_state(optimizer, names)
            self.optional.update(state)
            return found | updates(before, found) | state

        return step
