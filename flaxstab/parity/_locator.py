"""Finds the first layer of a pair of models that differs, forward and backward."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._typing import Array, DTypeLike, PyTree
from flaxstab.parity._alone import Programs
from flaxstab.parity._calls import Asked, Call, FlaxCalls, Told, TorchCalls
from flaxstab.parity._flax_side import as_inputs, compiled_program, stored_as
from flaxstab.parity._inputs import Inputs, Values, largest
from flaxstab.parity._layer_judge import Found, LayerPair
from flaxstab.parity._layer_table import LayerTable
from flaxstab.parity._layers import Direction, Location
from flaxstab.parity._precision import Precision, jax_at
from flaxstab.parity._program import REST, Modes, NNXProgram
from flaxstab.parity._torch_side import Rename, TorchSide, at_precision, numpy_of, torch_tensor
from flaxstab.parity._verdict import judge_semantics

if TYPE_CHECKING:
    import torch

Forms = Mapping[str, Sequence[Asked]]


class _Recorded:
    """A program whose modules' calls are recorded."""

    def __init__(self, program: NNXProgram, recorder: FlaxCalls) -> None:
        self._program, self._recorder = program, recorder

    def train(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        return self._run(params, rest, inputs, training=True)

    def evaluate(self, params: PyTree, rest: PyTree, inputs: list[Array]) -> tuple[object, PyTree]:
        return self._run(params, rest, inputs, training=False)

    def _run(
        self, params: PyTree, rest: PyTree, inputs: list[Array], *, training: bool
    ) -> tuple[object, PyTree]:
        model = self._program.merged(params, rest, training=training)
        with self._recorder.recording(model):
            output = model(*inputs)
        return output, nnx.state(model, REST)


class _Calls(NamedTuple):
    """PyTorch's calls in the order in which they ended, in either mode, and what they changed."""

    training: list[Call]
    evaluation: list[Call]
    notes: tuple[str, ...]


class Locator:
    """A pair of models of the same weights, ready to be compared layer by layer.

    Args:
      program: Flax's model.
      side: PyTorch's.
      fed: what both are given.
      dtype: a lower precision to judge, too, or float64.
      programs: what was compiled for layers like these.
    """

    def __init__(
        self,
        program: NNXProgram,
        side: TorchSide,
        fed: Inputs,
        dtype: DTypeLike = np.float64,
        programs: Programs | None = None,
    ) -> None:
        if side.module is None:
            raise ValueError("side must hold a torch.nn.Module, got a function.")
        self._program, self._side, self._fed, self._dtype = program, side, fed, dtype
        self._module = side.module
        self._exact = Precision(np.float64, dtype)
        self._modules = interop.named_modules(program.module)
        self._programs = programs or Programs()
        self._twins = self._paired()

    def _paired(self) -> dict[str, str]:
        """Returns Flax's name of each PyTorch module that has a counterpart."""
        found = {}
        for name, module in self._module.named_modules():
            tensors = [n for n, _ in [*module.named_parameters(recurse=False),
                                      *module.named_buffers(recurse=False)]]  # fmt: skip
            twin = _twin(name, tensors, self._side.rename, self._modules)
            if twin is not None and callable(self._modules[twin]):
                found[name] = twin
        return found

    def locate(self, *, free: bool = True, stop: bool = False) -> Location:
        """Compares layer by layer.

        Args:
          free: whether both models also run freely, which shows what is inherited and whether
            capturing changes a result.
          stop: whether to stop at the first layer that differs forward, and tell nothing backward.
        """
        calls = self._torch_calls(check_plain=free)
        forms, told, notes = self._flax_calls(free=free)
        notes = (*calls.notes, *notes, *self._unmatched(calls))
        if stop:  # going forward alone is faster
            ahead = calls._replace(training=[c._replace(cotangents=()) for c in calls.training])
            table = self._table(ahead, forms, told, stop=True)
            if table.differing("forward"):
                return table.location(notes, backward=False)
        return self._table(calls, forms, told).location(notes)

    def _table(
        self, calls: _Calls, forms: tuple[Forms, Forms], told: Told, *, stop: bool = False
    ) -> LayerTable:
        table = LayerTable(self._order(calls))
        for name in table.order:
            if table.holds(name):
                continue
            found, reason = self._judged(name, calls, forms)
            table.add(name, found, reason, self._inherited(name, found, calls, told))
            if stop and table.differing("forward"):
                break
        return table

    def _order(self, calls: _Calls) -> list[str]:
        ended = [call.name for call in (*calls.training, *calls.evaluation)]
        return list(dict.fromkeys(ended))

    def _torch_calls(self, *, check_plain: bool) -> _Calls:
        """Runs PyTorch's model with its calls recorded, in training and then in evaluation."""
        import torch

        side, fed = self._side, self._fed
        notes: tuple[str, ...] = ()
        with side.ready(fed, self._exact, self._program.module) as (module, tensors):
            model = module or self._module
            training = TorchCalls(model, self._twins)
            with training.recording():
                outputs = side.call(module, tensors, fed)
            smooth = {n: a for n, a in outputs.items() if a.requires_grad}
            first = training.calls(
                list(smooth.values()),
                [torch_tensor(_first(fed.cotangents[n], a)).to(a.dtype) for n, a in smooth.items()],
            )
            captured = {n: numpy_of(a) for n, a in outputs.items()}
            model.eval()
            evaluation = TorchCalls(model, self._twins)
            with evaluation.recording():
                side.call(module, tensors, fed)
            with torch.no_grad():
                second = evaluation.calls()
        if check_plain:
            with side.ready(fed, self._exact, self._program.module) as (module, tensors):
                outputs = side.call(module, tensors, fed)
                plain = {n: numpy_of(a) for n, a in outputs.items()}
            notes = _changed("PyTorch", plain, captured)
        return _Calls(first, second, notes)

    def _flax_calls(self, *, free: bool) -> tuple[tuple[Forms, Forms], Told, tuple[str, ...]]:
        """Returns how Flax calls its modules in either mode, and with ``free`` what they return."""
        told = Told()
        recorder, evaluating = FlaxCalls(told if free else None), FlaxCalls()
        notes: tuple[str, ...] = ()
        try:
            with jax_at(self._exact):
                params, rest, arrays = self._flax_inputs()
                # Tracing is enough: the recorder takes shapes.
                jax.eval_shape(_Recorded(self._program, evaluating).evaluate, params, rest, arrays)
                recorded = _Recorded(self._program, recorder)
                if free:
                    notes = self._run_freely(recorded, params, rest, arrays)
                else:
                    jax.eval_shape(recorded.train, params, rest, arrays)
        except Exception as error:  # whatever a model does when it is looked at
            first = str(error).strip().split("\n")[0][:80]
            notes = (f"Flax's calls could not be captured ({type(error).__name__}: {first})",)
        return (recorder.found, evaluating.found), told, notes

    def _flax_inputs(self) -> tuple[PyTree, PyTree, list[Array]]:
        params, rest = stored_as(self._program.variables(), self._exact)
        return params, rest, as_inputs(self._fed.arrays, self._exact.compute)

    def _run_freely(
        self, recorded: _Recorded, params: PyTree, rest: PyTree, arrays: list[Array]
    ) -> tuple[str, ...]:
        pulled = {n: jnp.asarray(c) for n, c in self._fed.cotangents.items()}
        runs = []
        both: tuple[Modes, Modes] = (recorded, self._program)
        for program in both:
            run = compiled_program(program, lambda function: function).gradients
            outputs, _, _ = jax.block_until_ready(run(params, rest, arrays, pulled))
            runs.append({n: np.asarray(a) for n, a in outputs.items()})
        jax.effects_barrier()
        return _changed("Flax", runs[1], runs[0])

    def _judged(
        self, name: str, calls: _Calls, forms: tuple[Forms, Forms]
    ) -> tuple[Found | None, str]:
        """Judges one layer alone; returns the reason if it cannot be."""
        twin, layer = self._twins[name], self._module.get_submodule(name)
        modes = ((calls.training, forms[0]), (calls.evaluation, forms[1]))
        pairs = [
            [
                (call, known[min(i, len(known) - 1)] if (known := by_name.get(twin, ())) else None)
                for i, call in enumerate(c for c in made if c.name == name)
            ]
            for made, by_name in modes
        ]
        try:
            exact = at_precision(layer, self._exact)
            low = None
            if np.dtype(self._dtype) != np.float64:
                low_kind = Precision(self._dtype, self._dtype)
                low = at_precision(layer, low_kind)
            pair = LayerPair(
                self._modules[twin], exact, low, layout=self._fed.layout,
                rename=self._local(name), programs=self._programs, dtype=self._dtype,
            )  # fmt: skip
            return pair.judge(*pairs), ""
        except Exception as error:  # a layer that does not run alone is an outcome
            return None, str(error).strip().split("\n")[0][:160]

    def _local(self, name: str) -> Rename:
        """Returns how a PyTorch layer's own names become those of its Flax twin."""
        twin = self._twins[name]

        def local(inner: str) -> str:
            if not inner:
                return ""
            full = f"{name}.{inner}" if name else inner
            known = self._twins.get(full)
            renamed = known if known is not None else _renamed(full, self._side.rename)
            return renamed.removeprefix(f"{twin}.") if twin else renamed

        return local

    def _inherited(
        self, name: str, found: Found | None, calls: _Calls, told: Told
    ) -> dict[Direction, float]:
        """Returns how far the layer's outputs and cotangents are apart where it stands."""
        worst: dict[Direction, float] = {"forward": np.nan, "backward": np.nan}
        if found is None:
            return worst
        theirs = [call for call in calls.training if call.name == name]
        kinds: tuple[tuple[Direction, str], ...]
        kinds = (("forward", "output"), ("backward", "cotangent"))
        for direction, kind in kinds:
            ours = told.of(self._twins[name], kind)
            values = [call.outputs if kind == "output" else call.cotangents for call in theirs]
            if len(ours) != len(values):
                continue
            for call in zip(ours, values, found.units, found.moved, strict=False):
                worst[direction] = _most(worst[direction], _apart(kind, *call))
        return worst

    def _unmatched(self, calls: _Calls) -> tuple[str, ...]:
        """Says which modules with tensors of their own were not compared."""
        seen = {call.name for call in (*calls.training, *calls.evaluation)}
        own = [
            (name, name in self._twins)
            for name, module in self._module.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        alone = [name for name, paired in own if not paired]
        uncalled = [name for name, paired in own if paired and name not in seen]
        notes = [f"no Flax layer has the name of {', '.join(alone[:4])}"] if alone else []
        notes += [f"PyTorch never calls {', '.join(uncalled[:4])}"] if uncalled else []
        return tuple(notes)


def _twin(
    name: str, tensors: Sequence[str], rename: Rename, modules: Mapping[str, nnx.Module]
) -> str | None:
    """Returns the name of a module's counterpart, given what becomes of its tensors' names."""
    if not name:
        return ""
    candidates = [
        renamed.removesuffix(f".{tensor}")
        for tensor in tensors
        if (renamed := _renamed(f"{name}.{tensor}", rename)).endswith(f".{tensor}")
    ]
    candidates += [_renamed(f"{name}.", rename).removesuffix("."), _renamed(name, rename)]
    return next((c for c in candidates if c and c in modules), None)


def _renamed(name: str, rename: Rename) -> str:
    try:
        return rename(name)
    except KeyError:  # a table of tensors does not know modules
        return name


def _first(cotangent: np.ndarray, like: "torch.Tensor") -> np.ndarray:
    """Returns a cotangent in the layout of PyTorch's output."""
    if tuple(like.shape) == cotangent.shape:
        return cotangent
    return np.ascontiguousarray(np.moveaxis(cotangent, -1, 1))


def _changed(side: str, plain: Values, captured: Values) -> tuple[str, ...]:
    """Says which results capturing changed, beyond what rounding does."""
    wrong = [
        name
        for name, value in plain.items()
        if not judge_semantics(name, captured[name], value, largest(value)).passed
    ]
    return (f"capturing changed {side}'s {', '.join(wrong[:3])}",) if wrong else ()


def _most(one: float, other: float) -> float:
    return other if np.isnan(one) else max(one, other)


def _apart(
    kind: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray],
    units: Sequence[np.ndarray], moved: Sequence[bool],
) -> float:  # fmt: skip
    """Returns how far one call's values are apart, over the layer's own bound."""
    worst = 0.0
    for a, b, unit, moves in zip(ours, theirs, units, moved, strict=False):
        there = np.moveaxis(b, 1, -1) if moves else b
        size = np.maximum(unit, largest(there)) if kind == "output" else largest(there)
        worst = max(worst, judge_semantics("", a, there, size).excess)
    return worst
