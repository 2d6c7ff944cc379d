"""A pair that differs, cut down to what still differs."""

import math
import re
import runpy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab._typing import PyTree
from flaxstab.parity._flax_side import FlaxSide
from flaxstab.parity._inputs import STEPS, Layout, is_float, own_rng
from flaxstab.parity._program import NNXProgram, program
from flaxstab.parity._script import Arrays, Quantity, Script, Side, Specimen, script
from flaxstab.parity._sources import Call, evaluated

if TYPE_CHECKING:
    import torch

_SIMPLER: tuple[tuple[str, object, str, object], ...] = (  # of Flax's and of PyTorch's argument
    ("use_bias", False, "bias", False),
    ("bias", False, "bias", False),
    ("strides", 1, "stride", 1),
    ("stride", 1, "stride", 1),
    ("kernel_dilation", 1, "dilation", 1),
    ("dilation", 1, "dilation", 1),
    ("padding", 0, "padding", 0),
)


@dataclass(frozen=True)
class Draft:
    """A pair as calls and named arrays, which can be cut.

    Attributes:
      flax: makes JAX's side.
      torch: makes PyTorch's.
      flax_arrays: what Flax's module holds by path; None of a function.
      torch_arrays: what PyTorch's module holds by name; None of a function.
      inputs: features last.
      name: of the quantity that differs, as the report calls it.
      dtype: in which precision.
      layout: as in :func:`compare`.
      bound: see :class:`Specimen`.
      mask: see :class:`Specimen`.
    """

    flax: Call
    torch: Call
    flax_arrays: Mapping[str, np.ndarray | None] | None
    torch_arrays: Mapping[str, np.ndarray] | None
    inputs: tuple[np.ndarray, ...]
    name: str
    dtype: str
    layout: Layout
    bound: float
    mask: float | None = None

    def built(self) -> "tuple[PyTree, PyTree]":
        """Returns both sides, made by the calls and holding the arrays, cut to their shapes.

        Raises:
          ValueError: if the arrays do not fit.
        """
        flax, torch_side = evaluated(self.flax.text), evaluated(self.torch.text)
        if self.flax_arrays is not None:
            state = nnx.state(flax)
            names, leaves = flax_leaves(flax)
            fitted = [
                _cut(self.flax_arrays[n], a.shape, n) for n, a in zip(names, leaves, strict=True)
            ]
            kept = [a if b is None else _like(b, a) for a, b in zip(leaves, fitted, strict=True)]
            nnx.update(flax, jax.tree.unflatten(jax.tree.structure(state), kept))
        if self.torch_arrays is not None:
            _load(torch_side, self.torch_arrays)
        return flax, torch_side

    def specimen(self) -> Specimen:
        """Returns the pair as a script needs it.

        Raises:
          ValueError: if it cannot run, or the quantity cannot be told by a script.
        """
        flax, torch_side = self.built()
        quantity = quantity_of(self.name, flax, self.inputs)
        flax_arrays: Arrays | None = None
        torch_arrays: Arrays | None = None
        if self.flax_arrays is not None:
            names, leaves = flax_leaves(flax)
            arrays = [None if _is_key(a) else np.asarray(a) for a in leaves]
            flax_arrays = [*zip(names, arrays, strict=True)]
        if self.torch_arrays is not None:
            held = torch_side.state_dict().items()
            torch_arrays = [(n, t.detach().numpy().copy()) for n, t in held]
        cotangents: Arrays = ()
        if quantity.kind.startswith("grad"):
            shapes = FlaxSide(program(flax, self.inputs)).output_shapes(self.inputs)
            rng = own_rng(0)
            drawn = {n: rng.normal(size=shape) for n, shape in shapes.items()}
            cotangents = [
                (n.removeprefix("output"), a.astype(np.float32).astype(np.float64))
                for n, a in drawn.items()
            ]
        return Specimen(
            Side(self.flax, flax_arrays), Side(self.torch, torch_arrays), self.inputs, cotangents,
            self.layout, quantity, self.dtype, self.bound, self.mask,
        )  # fmt: skip


def _is_key(leaf: PyTree) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def flax_leaves(module: PyTree) -> tuple[list[str], list[PyTree]]:
    """Returns the variables of a module in the order of its state, with their paths."""
    found = jax.tree_util.tree_leaves_with_path(nnx.state(module))
    names = [".".join(str(getattr(k, "key", "")) for k in path[:-1]) for path, _ in found]
    return names, [leaf for _, leaf in found]


def _cut(array: np.ndarray | None, shape: tuple[int, ...], name: str) -> np.ndarray | None:
    """Returns the corner of an array."""
    if array is None:
        return None
    if array.ndim != len(shape) or any(m > n for m, n in zip(shape, array.shape, strict=True)):
        raise ValueError(f"the arrays must fit the module, got {array.shape} for {name} {shape}.")
    return array[tuple(slice(n) for n in shape)]


def _like(array: np.ndarray, old: PyTree) -> PyTree:
    """Returns an array for a variable: floating-point ones as wide as they are."""
    with jax.enable_x64(True):
        return jnp.asarray(array, np.float64 if is_float(old) else old.dtype)


def _load(module: "torch.nn.Module", arrays: Mapping[str, np.ndarray]) -> None:
    import torch

    module.double()
    state = module.state_dict()
    fitted = {n: _cut(arrays[n], tuple(t.shape), n) for n, t in state.items()}
    module.load_state_dict({n: torch.tensor(a) for n, a in fitted.items()})


def quantity_of(name: str, flax: PyTree, inputs: Sequence[np.ndarray]) -> Quantity:
    """Returns how a script comes by a quantity.

    Args:
      name: as the report calls it.
      flax: JAX's side.
      inputs: of both sides.

    Raises:
      ValueError: if a script cannot.
    """
    whole = re.fullmatch(r"(?:step (\d+) |(after evaluation ))?(.*)", name)
    step, after, rest = whole.groups() if whole is not None else (None, None, name)
    steps = max(STEPS) if after else int(step or 1)
    if not isinstance(flax, nnx.Module):
        steps = 1
    if found := re.fullmatch(r"(output|evaluation)(.*)", rest):
        evaluates = found[1] == "evaluation"
        steps = max(STEPS) if evaluates and isinstance(flax, nnx.Module) else steps
        return Quantity(name, "output", steps, evaluates and isinstance(flax, nnx.Module), found[2])
    if found := re.fullmatch(r"grad input (\d+)", rest):
        floats = [i for i, a in enumerate(inputs) if is_float(a)]
        return Quantity(name, "grad input", place=floats[int(found[1])])
    torch_name = rest.removeprefix("grad ")
    places = _places(flax) if isinstance(flax, nnx.Module) else {}
    if torch_name not in places:
        raise ValueError(f"a script must tell {name} from Flax's variables, got none of that name.")
    place, move = places[torch_name]
    kind = "grad" if rest.startswith("grad ") else "buffer"
    return Quantity(
        name,
        "grad" if kind == "grad" else "buffer",
        steps,
        bool(after),
        "",
        place,
        torch_name,
        move,
    )


def _places(module: nnx.Module) -> dict[str, tuple[int, str]]:
    """Returns for PyTorch's names the place of Flax's variable, and what moves its axes."""
    made = NNXProgram(module)
    _, leaves = flax_leaves(module)
    tree, tagged, start = jax.tree.structure(nnx.state(module)), [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        numbers = np.arange(start, start + size, dtype=np.float64).reshape(leaf.shape)
        tagged.append(leaf if _is_key(leaf) else numbers)
        start += size
    state = jax.tree.unflatten(tree, tagged)
    params = nnx.filter_state(state, nnx.Param)
    rest = nnx.filter_state(state, nnx.Not(nnx.Param))
    found = {**made.named(params, gradients=True), **made.named(rest)}
    places = {}
    for name, array in found.items():
        for i, leaf in enumerate(tagged):
            move = None if _is_key(leaf) else _move(leaf, np.asarray(array))
            if move is not None:
                places[name] = (i, move)
    return places


def _move(source: np.ndarray, target: np.ndarray) -> str | None:
    """Returns the code that makes one array of the other; None if axes alone do not."""
    if source.size != target.size or not target.size or source.min() != target.min():
        return None
    for order in permutations(range(source.ndim)):
        moved = source.transpose(order)
        code = "" if order == tuple(range(source.ndim)) else f".transpose({order})"
        if np.array_equal(moved.reshape(target.shape), target):
            return code if moved.shape == target.shape else f"{code}.reshape({target.shape})"
    return None


def differs(specimen: Specimen) -> bool:
    """Whether a specimen's script finds the difference, run here; False if it cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = save(script(specimen), Path(folder) / "probe.py")
            _, _, _, error, limit = runpy.run_path(str(path), run_name="probe")["measure"]()
        except Exception:  # a cut that no longer runs is no smaller case
            return False
    return not error <= limit


def save(made: Script, path: Path) -> Path:
    """Writes a script, and its arrays beside it, without a word of pickle."""
    if made.arrays:
        with path.with_suffix(".npz").open("wb") as file:
            np.savez(file, **made.arrays)  # type: ignore[arg-type]
    path.write_text(made.text, encoding="utf-8")
    return path


def shrunk(draft: Draft, patience: float) -> tuple[Draft, Specimen]:
    """Cuts inputs, features and options as far as the difference stays.

    Args:
      draft: one that differs.
      patience: in seconds, after which no more cuts are tried.

    Returns:
      The smallest draft that was found, and its specimen.
    """
    best, specimen, end = draft, draft.specimen(), time.monotonic() + patience
    for cuts in (_options, _features, _axes):
        tried: set[str] = set()
        while time.monotonic() < end:
            chosen = next((c for c in cuts(best) if c[0] not in tried), None)
            if chosen is None:
                break
            label, candidates = chosen
            tried.add(label)
            for after, candidate in candidates:
                found = _specimen(candidate)
                if found is not None and differs(found):
                    best, specimen = candidate, found
                    tried.add(after)  # what is smaller still did not do
                    break
                if time.monotonic() > end:
                    break
    return best, specimen


def _specimen(draft: Draft) -> Specimen | None:
    try:
        return draft.specimen()
    except Exception:  # constructors refuse what they cannot be
        return None


Cuts = Iterator[tuple[str, list[tuple[str, Draft]]]]  # from a label to others, the smallest first


def _sizes(n: int) -> list[int]:
    """Returns the smaller sizes to try: 1, 2, 3, 4, 6, 8, 12, ..."""
    found = (
        {1, 2, 3}
        | {2**k for k in range(n.bit_length())}
        | {3 * 2**k for k in range(n.bit_length())}
    )
    return sorted(size for size in found if size < n)


def _axes(draft: Draft) -> Cuts:
    """Yields cuts of an axis: in all inputs that have as many elements there."""
    for axis in range(max((a.ndim for a in draft.inputs), default=0)):
        for size in sorted({a.shape[axis] for a in draft.inputs if a.ndim > axis}):
            cut = [tuple(_shorter(a, axis, size, n) for a in draft.inputs) for n in _sizes(size)]
            yield (
                f"axis {axis} of {size}",
                [
                    (f"axis {axis} of {n}", replace(draft, inputs=inputs))
                    for n, inputs in zip(_sizes(size), cut, strict=True)
                ],
            )


def _shorter(array: np.ndarray, axis: int, old: int, new: int) -> np.ndarray:
    if array.ndim <= axis or array.shape[axis] != old:
        return array
    return array[(slice(None),) * axis + (slice(new),)]


def _features(draft: Draft) -> Cuts:
    """Yields cuts of a size that both constructors name."""
    for size in sorted(_numbers(draft.flax) & _numbers(draft.torch)):
        yield (
            f"features {size}",
            [
                (
                    f"features {n}",
                    replace(
                        draft,
                        flax=_resized(draft.flax, size, n),
                        torch=_resized(draft.torch, size, n),
                        inputs=tuple(_shorter(a, a.ndim - 1, size, n) for a in draft.inputs),
                    ),
                )
                for n in _sizes(size)
            ],
        )


def _numbers(call: Call) -> set[int]:
    found: set[int] = set()
    for value in call.values.values():
        items = value if isinstance(value, tuple) else (value,)
        found |= {n for n in items if isinstance(n, int) and not isinstance(n, bool)}
    return found


def _resized(call: Call, old: int, new: int) -> Call:
    def other(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(new if item == old else item for item in value)
        return new if value == old and type(value) is int else value

    changed = {n: other(value) for n, value in call.values.items()}
    return call.varied({n: value for n, value in changed.items() if value != call.values[n]})


def _options(draft: Draft) -> Cuts:
    """Yields the options that could be simpler on both sides at once."""
    if draft.flax.arguments is None or draft.torch.arguments is None:
        return
    for ours, simple, theirs, plain in _SIMPLER:
        if draft.flax.arguments.get(ours) != repr(simple):
            flax, torch_side = (
                draft.flax.varied({ours: simple}),
                draft.torch.varied({theirs: plain}),
            )
            yield f"{ours}", [(ours, replace(draft, flax=flax, torch=torch_side))]
