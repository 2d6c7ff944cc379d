"""Every call of every submodule while a model runs, on either side."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._typing import Array, PyTree
from flaxstab.parity._inputs import is_float

if TYPE_CHECKING:
    import torch

_TAG = "parity_name"  # a module's name, kept by it through split and merge


class Slot(NamedTuple):
    """Where an array stands among a call's arguments.

    Attributes:
      place: of the array among those of the call.
    """

    place: int


class Form(NamedTuple):
    """How a module was called, without the arrays.

    Attributes:
      tree: the structure of ``(args, kwargs)``.
      leaves: a :class:`Slot` for each array, and everything else as it was.
    """

    tree: jax.tree_util.PyTreeDef
    leaves: tuple[object, ...]

    def filled(self, arrays: Sequence[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Returns the arguments and keyword arguments with other arrays."""
        values = [arrays[v.place] if isinstance(v, Slot) else v for v in self.leaves]
        args, kwargs = jax.tree.unflatten(self.tree, values)
        return args, kwargs


class Asked(NamedTuple):
    """How a Flax module was called.

    Attributes:
      form: without the arrays; one that is given twice has one slot.
      arrays: the shapes and dtypes of what it was given.
    """

    form: Form
    arrays: tuple[jax.ShapeDtypeStruct, ...]


class Call(NamedTuple):
    """One call of a PyTorch module.

    Attributes:
      name: of the module.
      form: how it was called; a tensor that is given twice has one slot.
      arrays: what it was given.
      outputs: its floating-point results in order.
      cotangents: of the outputs, or none if there was no backward pass.
    """

    name: str
    form: Form
    arrays: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...] = ()


def _form(call: PyTree, is_array: Callable[[object], bool]) -> tuple[Form, list[object]]:
    leaves, tree = jax.tree.flatten(call)
    arrays: list[object] = []
    places: dict[int, int] = {}
    found: list[object] = []
    for leaf in leaves:
        if is_array(leaf):
            place = places.setdefault(id(leaf), len(arrays))
            arrays += [leaf] if place == len(arrays) else []
            found.append(Slot(place))
        else:
            found.append(leaf)
    return Form(tree, tuple(found)), arrays


def _is_array(value: object) -> TypeGuard[Array | np.ndarray]:
    return isinstance(value, jax.Array | np.ndarray)


class TorchCalls:
    """Records what PyTorch's modules are given and return.

    Outputs are passed on as copies, or a later operation in place would change the record.

    Args:
      model: the model; nothing of it is changed for good.
      names: of the modules to record.
    """

    def __init__(self, model: "torch.nn.Module", names: Collection[str]) -> None:
        self._model, self._names = model, names
        self._open: list[tuple[Form, list[torch.Tensor]]] = []
        self._done: list[tuple[str, Form, list[torch.Tensor], list[torch.Tensor]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records calls inside a ``with`` block."""
        handles = []
        for name, module in self._model.named_modules():
            if name in self._names:
                # First of all hooks to see the arguments, last to see the output: a dropout's
                # output is the replayed one.
                handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._leave(name)),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        import torch

        del module
        form, tensors = _form((args, kwargs), lambda leaf: isinstance(leaf, torch.Tensor))
        self._open.append((form, [_copy(tensor) for tensor in tensors]))

    def _leave(self, name: str) -> Callable[..., PyTree]:
        import torch

        def leave(module: object, inputs: object, output: PyTree) -> PyTree:
            del module, inputs
            form, arrays = self._open.pop()
            leaves, tree = jax.tree.flatten(output)
            floats = [a for a in leaves if isinstance(a, torch.Tensor) and a.is_floating_point()]
            self._done.append((name, form, arrays, floats))
            known = {id(a) for a in floats}
            return jax.tree.unflatten(tree, [a.clone() if id(a) in known else a for a in leaves])

        return leave

    def calls(
        self,
        outputs: "Sequence[torch.Tensor]" = (),
        cotangents: "Sequence[torch.Tensor]" = (),
    ) -> list[Call]:
        """Returns the calls in the order in which they ended.

        Args:
          outputs: the model's, to go back from; none for a forward pass alone.
          cotangents: of these outputs.
        """
        import torch

        smooth = [a for *_, floats in self._done for a in floats if a.requires_grad]
        grads: list[torch.Tensor] = []
        if smooth and outputs:
            grads = list(
                torch.autograd.grad(
                    outputs, smooth, cotangents, allow_unused=True, materialize_grads=True
                )
            )
        pulled = {id(a): g for a, g in zip(smooth, grads, strict=False)}
        return [
            Call(
                name, form, tuple(map(_numpy, arrays)), tuple(map(_numpy, floats)),
                tuple(_numpy(pulled.get(id(a), torch.zeros_like(a))) for a in floats),
            )
            for name, form, arrays, floats in self._done
        ]  # fmt: skip


def _copy(tensor: "torch.Tensor") -> "torch.Tensor":
    return tensor.detach().clone()


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    return tensor.detach().numpy()


Tell = Callable[[tuple[str, int, str, int], np.ndarray], None]


class FlaxCalls:
    """Records what Flax's modules are given and return, also inside of JAX's transformations.

    Args:
      tell: is told values, by module, number of the call, 'output' or 'cotangent', and place;
        None if shapes are enough.
    """

    def __init__(self, tell: Tell | None = None) -> None:
        self.found: dict[str, list[Asked]] = {}
        self._tell, self._open = tell, [""]

    @contextmanager
    def recording(self, model: nnx.Module) -> Iterator[None]:
        """Records calls of a model's modules inside a ``with`` block.

        Args:
          model: its modules are marked: a copy, please.
        """
        modules = interop.named_modules(model)
        for name, module in modules.items():
            if callable(module):
                setattr(module, _TAG, name or ".")
        kinds = dict.fromkeys(type(module) for module in modules.values() if callable(module))
        with _calling(kinds, self._call):
            yield

    def _call(self, original: Callable[..., PyTree], module: nnx.Module, *args: object,
              **kwargs: object) -> PyTree:  # fmt: skip
        tag = vars(module).get(_TAG)
        # A method that calls that of a base class is one call.
        if tag is None or self._open[-1] == tag:
            return original(module, *args, **kwargs)
        self._open.append(tag)
        try:
            output = original(module, *args, **kwargs)
        finally:
            self._open.pop()
        name = "" if tag == "." else tag
        number = len(self.found.setdefault(name, []))
        form, arrays = _form((args, kwargs), _is_array)
        asked = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays if _is_array(a))
        self.found[name].append(Asked(form, tuple(asked)))
        leaves, tree = jax.tree.flatten(output)
        floats = [a for a in leaves if isinstance(a, jax.Array) and is_float(a)]
        if self._tell is None:
            return output
        places = {id(a): place for place, a in enumerate(floats)}
        tapped = [
            _tapped(a, self._tell, (name, number), places[id(a)]) if id(a) in places else a
            for a in leaves
        ]
        return jax.tree.unflatten(tree, tapped)


def _tapped(value: Array, tell: Tell, call: tuple[str, int], place: int) -> Array:
    """Returns a value that tells itself when it is computed, and its cotangent likewise."""

    def told(kind: str, array: Array) -> None:
        # As bits, for a callback's thread may not know of float64.
        wide = array.astype(jnp.float64)
        bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
        jax.debug.callback(
            lambda a: tell((*call, kind, place), np.asarray(a).view(np.float64)[..., 0]), bits
        )

    @jax.custom_vjp
    def tap(x: Array) -> Array:
        return x

    def forward(x: Array) -> tuple[Array, None]:
        return x, None

    def backward(_: None, cotangent: Array) -> tuple[Array]:
        told("cotangent", cotangent)
        return (cotangent,)

    tap.defvjp(forward, backward)
    told("output", value)
    return tap(value)


@contextmanager
def _calling(kinds: Mapping[type, None], call: Callable[..., PyTree]) -> Iterator[None]:
    """Lets calls of modules of some types go through a function, inside a ``with`` block."""
    own = {kind: vars(kind).get("__call__") for kind in kinds}
    around = {kind: getattr(kind, "__call__") for kind in kinds}  # noqa: B004, B009
    for kind in kinds:
        setattr(kind, "__call__", _through(call, around[kind]))  # noqa: B010 - on purpose
    try:
        yield
    finally:
        for kind, method in own.items():
            if method is None:
                delattr(kind, "__call__")
            else:
                setattr(kind, "__call__", method)  # noqa: B010


def _through(call: Callable[..., PyTree], original: Callable[..., PyTree]) -> Callable[..., PyTree]:
    def around(module: nnx.Module, *args: object, **kwargs: object) -> PyTree:
        return call(original, module, *args, **kwargs)

    return around


class Told:
    """Values that a compiled program told."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, int, str, int], list[np.ndarray]] = {}

    def __call__(self, key: tuple[str, int, str, int], value: np.ndarray) -> None:
        self._values.setdefault(key, []).append(np.array(value))

    def of(self, name: str, kind: str) -> list[tuple[np.ndarray, ...]]:
        """Returns the values of each call of a module; none if it was called in a loop."""
        keys = sorted(key for key in self._values if key[0] == name and key[2] == kind)
        if not all(_same(self._values[key]) for key in keys):
            return []
        numbers = dict.fromkeys(key[1] for key in keys)
        return [tuple(self._values[k][0] for k in keys if k[1] == n) for n in numbers]


def _same(values: Sequence[np.ndarray]) -> bool:
    """Whether a value that was told several times was computed again, and not another one."""
    first = values[0]
    near = 1e-6 * float(np.max(np.abs(first), initial=0))
    return all(np.allclose(first, v, rtol=0, atol=near, equal_nan=True) for v in values[1:])
