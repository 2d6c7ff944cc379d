"""Runs one layer of each side alone, on what PyTorch's layer was given in the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._typing import Array, DTypeLike, PyTree, Shape
from flaxstab.parity._calls import Form
from flaxstab.parity._fit import Fit
from flaxstab.parity._flax_side import as_inputs, stored_as
from flaxstab.parity._inputs import Layout, Values, is_float, is_integral, own_rng, round_to
from flaxstab.parity._magnitude import DRAWS, UNIT, moved, rounded
from flaxstab.parity._precision import EXACT, Precision, jax_at
from flaxstab.parity._program import REST
from flaxstab.parity._replay import Draws, replayed
from flaxstab.parity._torch_side import Rename, numpy_of, torch_dtype, torch_tensor

if TYPE_CHECKING:
    import torch

Gradients = Callable[..., tuple[PyTree, PyTree, PyTree]]


class Programs:
    """What was compiled, kept for layers of the same type, settings and call.

    Args:
      base: programs that are taken where they fit, and not added to.
    """

    def __init__(self, base: "Programs | None" = None) -> None:
        self._known: dict[object, Gradients] = {} if base is None else dict(base._known)
        self._kept: list[object] = []  # so that their ids stay theirs

    def gradients(self, graph: nnx.GraphDef[nnx.Module], form: Form, bits: int | None) -> Gradients:
        """Returns a layer's outputs, gradients and state as a compiled function.

        Args:
          graph: the layer's, in either mode.
          form: how it is called.
          bits: to which every operation is rounded; None = to none, see ``magnitude``.
        """
        key: object = (graph, form.tree, form.leaves, bits)
        try:
            hash(key)
        except TypeError:  # an argument that is no array, such as a list of sizes
            key = (id(graph), id(form), bits)
            self._kept.append((graph, form))
        if key not in self._known:
            made = _gradients(graph, form)
            self._known[key] = jax.jit(made if bits is None else rounded(made, bits))
        return self._known[key]


def _gradients(graph: nnx.GraphDef[nnx.Module], form: Form) -> Gradients:
    def run(
        params: PyTree, rest: PyTree, arrays: Sequence[Array], cotangents: Sequence[Array] | None
    ) -> tuple[PyTree, PyTree, PyTree]:
        where = [i for i, a in enumerate(arrays) if is_float(a)]

        def forward(params: PyTree, floats: list[Array]) -> tuple[list[Array], PyTree]:
            given = dict(zip(where, floats, strict=True))
            layer = nnx.merge(graph, params, rest, copy=True)
            args, kwargs = form.filled([given.get(i, a) for i, a in enumerate(arrays)])
            leaves = jax.tree.leaves(layer(*args, **kwargs))
            return [a for a in leaves if is_float(a)], nnx.state(layer, REST)

        floats = [arrays[i] for i in where]
        if cotangents is None:
            outputs, after = forward(params, floats)
            return outputs, ({}, []), after
        outputs, pullback, after = jax.vjp(forward, params, floats, has_aux=True)
        pulled = [jnp.asarray(c, a.dtype) for c, a in zip(cotangents, outputs, strict=True)]
        return outputs, pullback(pulled), after

    return run


class Fed(NamedTuple):
    """What a layer is given.

    Attributes:
      arrays: features last.
      cotangents: of its outputs, likewise; None for a forward pass alone.
    """

    arrays: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...] | None

    def rounded(self, dtype: DTypeLike) -> "Fed":
        """Returns the same rounded to a dtype, as float64."""
        pulled = self.cotangents and tuple(round_to(a, dtype) for a in self.cotangents)
        return Fed(tuple(round_to(a, dtype) for a in self.arrays), pulled)

    def redrawn(self, seed: int) -> "Fed":
        """Returns inputs and cotangents a little way off: 1/64 of each value."""
        rng = own_rng(seed)

        def near(array: np.ndarray) -> np.ndarray:
            if not is_float(array) or is_integral(array):
                return array
            return array * (1 + rng.uniform(-1, 1, array.shape) / 64)

        return Fed(
            tuple(map(near, self.arrays)), self.cotangents and tuple(map(near, self.cotangents))
        )


class FlaxLayer:
    """A layer of a Flax model, alone.

    Args:
      module: the layer, in training mode.
      programs: shared by the layers of a model.
      stored: the dtype to which parameters and statistics are rounded first.
    """

    def __init__(self, module: nnx.Module, programs: Programs, stored: DTypeLike) -> None:
        self.module, self._programs = module, programs
        self.naming = interop.Naming(module)
        evaluating = nnx.clone(module)
        evaluating.eval()
        self._graphs = {True: nnx.graphdef(module), False: nnx.graphdef(evaluating)}
        _, self._params, *rest = nnx.split(module, nnx.Param, ...)
        self.has_modes = self._graphs[True] != self._graphs[False] or bool(jax.tree.leaves(rest[0]))
        with jax_at(EXACT):
            self.start = stored_as(rest[0], Precision(np.float64, stored))

    def at(self, rest: PyTree) -> nnx.Module:
        """Returns the layer in training mode with some state."""
        return nnx.merge(self._graphs[True], self._params, rest, copy=True)

    def run(
        self, form: Form, fed: Fed, rest: PyTree, precision: Precision, *, training: bool
    ) -> tuple[Values, PyTree]:
        """Returns every quantity, and the state after the call."""
        gradients = self._programs.gradients(self._graphs[training], form, None)
        # Matrix products in TF32 are no layer's fault.
        with jax_at(precision), jax.default_matmul_precision("highest"):
            params, state = stored_as(self._params, precision), _as_wide(rest, precision)
            return self._named(gradients, params, state, fed, precision.compute)

    def shapes(self, form: Form, fed: Fed, rest: PyTree, *, training: bool) -> list[Shape]:
        """Returns the shapes of the floating-point outputs."""
        gradients = self._programs.gradients(self._graphs[training], form, None)
        with jax_at(EXACT):
            arrays = [jnp.asarray(a) for a in fed.arrays]
            exact = stored_as(self._params, EXACT), _as_wide(rest, EXACT)
            outputs, *_ = jax.eval_shape(lambda *a: gradients(*a, None), *exact, arrays)
        return [tuple(a.shape) for a in outputs]

    def moves(
        self, form: Form, fed: Fed, rest: PyTree, precision: Precision, bits: int | None,
        unit: float = UNIT, *, training: bool,
    ) -> list[Values]:  # fmt: skip
        """Returns the quantities of float64 runs with everything moved by a unit of its size.

        Args:
          form: how the layer is called.
          fed: with what.
          rest: its state.
          precision: of the run that is moved.
          bits: to which every operation is rounded, too; None = to none.
          unit: by which parameters, arrays and cotangents are moved.
          training: the mode.
        """
        gradients, found = self._programs.gradients(self._graphs[training], form, bits), []
        with jax_at(EXACT):
            exact, state = stored_as(self._params, precision), _as_wide(rest, precision)
            for seed in range(DRAWS):
                params, arrays, pulled = moved((exact, fed.arrays, fed.cotangents), seed, unit)
                # Masks and classes given as floats stay: moving them would cross jumps.
                kept = [
                    a if is_integral(a) else np.asarray(b)
                    for a, b in zip(fed.arrays, arrays, strict=True)
                ]
                given = Fed(tuple(kept), pulled)
                found.append(self._named(gradients, params, state, given, np.float64)[0])
        return found

    def _named(
        self, gradients: Gradients, params: PyTree, rest: PyTree, fed: Fed, dtype: DTypeLike
    ) -> tuple[Values, PyTree]:
        arrays = as_inputs(fed.arrays, dtype)
        given = fed.cotangents
        pulled = None if given is None else [jnp.asarray(a) for a in given]
        outputs, (params, inputs), after = gradients(params, rest, arrays, pulled)
        grads = self.naming.tensors(params, gradients=True) if pulled else {}
        found = named(outputs, inputs, grads, self.naming.tensors(after))
        return {name: np.asarray(a) for name, a in found.items()}, after


def named(
    outputs: Sequence[PyTree],
    inputs: Sequence[PyTree],
    grads: Mapping[str, PyTree],
    buffers: Mapping[str, PyTree],
) -> dict[str, PyTree]:
    """Returns a layer's results by the names that they have in a report."""
    one = len(outputs) == 1
    found = {"output" if one else f"output[{i}]": a for i, a in enumerate(outputs)}
    found |= {f"grad input {i}": a for i, a in enumerate(inputs)}
    found |= {f"grad {name}": a for name, a in grads.items()}
    return found | {f"step 1 {name}": a for name, a in buffers.items()}


class TorchLayer:
    """A layer of a PyTorch model, alone; its buffers move from call to call.

    Args:
      module: the layer at some precision.
      layout: see :func:`compare`.
      rename: from the layer's own names to those of its Flax twin.
    """

    def __init__(self, module: "torch.nn.Module", layout: Layout, rename: Rename) -> None:
        self.module, self._layout, self._rename = module, layout, rename

    def run(
        self, fitted: Fit, fed: Fed, outputs: Sequence[bool | None], precision: Precision,
        twin: nnx.Module, *, training: bool,
    ) -> Values:  # fmt: skip
        """Returns every quantity, in Flax's layout.

        Args:
          fitted: how the layer is called.
          fed: with what.
          outputs: which of its outputs have the channels at axis 1.
          precision: at which to compute.
          twin: the Flax layer, whose draws are replayed.
          training: the mode.
        """
        import torch

        tensors = [self._placed(*pair, precision) for pair in zip(fed.arrays, fitted.moved,
                                                                  strict=True)]  # fmt: skip
        self.module.train(training)
        replaying = replayed(twin, self.module, self._layout, Draws(), self._rename)
        with jax_at(precision), torch.enable_grad(), replaying:
            args, kwargs = fitted.theirs.filled([t.clone() for t in tensors])
            leaves = jax.tree.leaves(self.module(*args, **kwargs))
        found = [a for a in leaves if isinstance(a, torch.Tensor) and a.is_floating_point()]
        inputs, grads = self._gradients(tensors, found, fed, outputs)
        kept = self.module.state_dict().keys()
        buffers = {
            self._rename(n): numpy_of(b).copy()
            for n, b in self.module.named_buffers() if n in kept
        }  # fmt: skip
        last = [_last(numpy_of(a), bool(m)) for a, m in zip(found, outputs, strict=True)]
        floats = [m for a, m in zip(fed.arrays, fitted.moved, strict=True) if is_float(a)]
        back = [_last(numpy_of(g), m) for g, m in zip(inputs, floats, strict=False)]
        return named(last, back, grads, buffers)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Gives the layer's buffers back what they held, after a ``with`` block."""
        before = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        try:
            yield
        finally:
            for name, buffer in self.module.named_buffers():
                buffer.data.copy_(before[name])

    def _placed(self, array: np.ndarray, moves: bool, precision: Precision) -> "torch.Tensor":
        tensor = torch_tensor(_first(array, moves))
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch_dtype(precision.compute)).requires_grad_()

    def _gradients(
        self, tensors: "list[torch.Tensor]", found: "list[torch.Tensor]", fed: Fed,
        outputs: Sequence[bool | None],
    ) -> "tuple[Sequence[torch.Tensor], dict[str, np.ndarray]]":  # fmt: skip
        import torch

        if fed.cotangents is None:
            return [], {}
        floats = [t for t in tensors if t.requires_grad]
        params = dict(self.module.named_parameters())
        pulled = [
            torch_tensor(_first(c, bool(m))).to(a.dtype)
            for a, c, m in zip(found, fed.cotangents, outputs, strict=True)
        ]
        smooth = [(a, c) for a, c in zip(found, pulled, strict=True) if a.requires_grad]
        wanted = [*floats, *params.values()]
        grads: Sequence[torch.Tensor] = [torch.zeros_like(t) for t in wanted]
        if smooth and wanted:
            ends, ways = zip(*smooth, strict=True)
            grads = torch.autograd.grad(
                ends, wanted, ways, allow_unused=True, materialize_grads=True
            )
        named_grads = zip(params, grads[len(floats) :], strict=True)
        return grads[: len(floats)], {self._rename(n): numpy_of(g) for n, g in named_grads}


def _as_wide(rest: PyTree, precision: Precision) -> PyTree:
    """Returns statistics in the dtype that a precision keeps them in, not rounded further."""
    return stored_as(rest, Precision(precision.compute, precision.wide))


def _first(array: np.ndarray, moves: bool) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if moves else array


def _last(array: np.ndarray, moves: bool) -> np.ndarray:
    return np.moveaxis(array, 1, -1) if moves else array
