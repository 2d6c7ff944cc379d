"""The smallest failing case of a comparison, as a script that stands alone."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flaxstab import __version__, interop
from flaxstab._checks import check
from flaxstab._environment import describe
from flaxstab._files import write_whole
from flaxstab._typing import DTypeLike, PyTree
from flaxstab.parity._carry import Weights
from flaxstab.parity._inputs import Layout, channels_first, channels_last, round_to
from flaxstab.parity._layers import WHOLE
from flaxstab.parity._models import Pair
from flaxstab.parity._replay import torch_rate
from flaxstab.parity._replay_attention import attention_rate
from flaxstab.parity._report import Report
from flaxstab.parity._reproduce_optimizer import optimizer_specimen
from flaxstab.parity._script import Script, Specimen, script
from flaxstab.parity._sources import is_module, source_of
from flaxstab.parity._specimen import Draft, differs, flax_leaves, shrunk
from flaxstab.parity._torch_side import Rename, numpy_of, torch_tensor
from flaxstab.parity._verdict import Finding

if TYPE_CHECKING:
    import torch

_KINDS = ("output", "grad input", "grad", "step", "evaluation", "after")
_DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "DropPath", "StochasticDepth")


class Reproduction(NamedTuple):
    """A script that shows a difference.

    Attributes:
      path: of the script; an ``.npz`` file of the same name holds its arrays if they are many.
      quantity: what differs in it, such as ``'output in float32'``.
      layer: the layer that it shows, by PyTorch's name; '' for the whole of both sides.
      shapes: of the inputs that were left.
      flax: the expression that makes JAX's side.
      torch: the expression that makes PyTorch's side.
    """

    path: Path
    quantity: str
    layer: str
    shapes: tuple[tuple[int, ...], ...]
    flax: str
    torch: str

    def __str__(self) -> str:
        of = f" of {self.layer}" if self.layer else ""
        shapes = ", ".join(map(str, self.shapes))
        return f"{self.quantity}{of} with {shapes}: {self.flax} beside {self.torch}: {self.path}"


class _Options(NamedTuple):
    """How the sides are compared."""

    layout: Layout
    rename: Rename | None
    dtypes: Sequence[DTypeLike]
    seed: int


class _Sides(NamedTuple):
    """What the caller gave, and how they say that it is made."""

    flax: object
    torch: object
    flax_source: str
    torch_source: str


def reproduce(
    flax_side: object,
    torch_side: "torch.nn.Module | Callable[..., PyTree]",
    *inputs: np.ndarray,
    path: str | PathLike[str],
    layout: Layout = None,
    weights: Weights = "torch",
    rename: Rename | None = None,
    dtypes: Sequence[DTypeLike] = (np.float32,),
    seed: int = 0,
    flax_source: str = "",
    torch_source: str = "",
    patience: float = 30.0,
    report: Report | None = None,
) -> Reproduction:
    """Writes a script that shows, with as little as possible, that two sides differ.

    Of two models the first layer that differs is taken, with what PyTorch fed it; then options
    are dropped, and features, batch and spatial axes are cut as far as the difference stays. The
    script holds the numbers, makes both sides, prints both results, those of float64 and the
    error over its limit. It exits with 1 while the difference exists and with 0 when it is gone.
    It needs jax, flax (optax), torch and numpy, not flaxstab, unless a layer is flaxstab's or
    yours: that one it imports.

    Args:
      flax_side: as in :func:`compare`: an ``nnx.Module``, a function or an optax transformation.
      torch_side: its counterpart.
      *inputs: as in :func:`compare`.
      path: of the script; its folder must exist.
      layout: as in :func:`compare`.
      weights: as in :func:`compare`.
      rename: as in :func:`compare`.
      dtypes: as in :func:`compare`.
      seed: as in :func:`compare`.
      flax_source: the expression that makes ``flax_side``, such as ``'optax.adam(1e-3)'``; it is
        needed where the side does not tell its arguments: optax transformations, classes that
        keep them under other names, functions without a name.
      torch_source: the same for ``torch_side``.
      patience: seconds after which nothing more is cut.
      report: what :func:`compare` found with the same arguments, if that is known already.

    Returns:
      The script's place, and what it shows.

    Raises:
      ValueError: if the sides agree, cannot be compared, or cannot be written as a script.

    Example:
      >>> import tempfile, numpy, torch
      >>> from flaxstab.parity import reproduce
      >>> x = numpy.linspace(-2.0, 2.0, 8)
      >>> with tempfile.TemporaryDirectory() as folder:  # nnx.gelu is the tanh form
      ...     found = reproduce(nnx.gelu, torch.nn.functional.gelu, x, path=f"{folder}/gelu.py")
      ...     print(found.quantity, found.shapes, found.flax)
      output in float64 ((1,),) nnx.gelu
    """
    target = Path(fspath(path))
    check(target.suffix == ".py", "path must end in .py", path=str(target))
    arrays = tuple(interop.to_numpy(a) for a in inputs)
    if isinstance(flax_side, optax.GradientTransformation):
        specimen = optimizer_specimen(
            flax_side, torch_side, arrays, dtypes, seed, flax_source, torch_source
        )
        return _written(specimen, "", target)
    sides = _Sides(flax_side, torch_side, flax_source, torch_source)
    options = _Options(layout, rename, dtypes, seed)
    pair = Pair(flax_side, torch_side, arrays, layout=layout, weights=weights, rename=rename)
    report = report or pair.judge(arrays, dtypes=dtypes, seed=seed)
    failing = _failing(report)
    check(bool(failing), "the two sides must differ", verdict=str(report.verdict))
    for layer, draft in _drafts(pair, sides, arrays, report, options):
        found = _shrunk(draft, patience)
        if found is not None:
            return _written(found, layer, target)
    raise ValueError(
        "a script must show the difference by itself, got one that only the whole comparison "
        f"shows: {failing[0].name} in {failing[0].dtype}. Pass fewer layers."
    )


def _drafts(
    pair: Pair,
    sides: _Sides,
    inputs: tuple[np.ndarray, ...],
    report: Report,
    options: _Options,
) -> Iterator[tuple[str, Draft]]:
    """Yields drafts that differ: of the first layer that does, then of everything."""
    flax, torch_side = pair.sides()
    if isinstance(flax, nnx.Module) and torch_side is not None:
        name = _first_layer(pair, inputs, report, options.seed)
        yield from _of_layer(name, flax, torch_side, inputs, options) if name else ()
    whole = sides._replace(flax=flax or sides.flax, torch=torch_side or sides.torch)
    for finding in _failing(report)[:3]:
        yield "", _draft(whole, inputs, finding, options, pair)


def _first_layer(pair: Pair, inputs: tuple[np.ndarray, ...], report: Report, seed: int) -> str:
    """Returns the name of the first layer that differs; '' if it is the whole, or none does."""
    kind = _failing(report)[0].dtype
    if kind == "float64" and report.location is not None:
        found = report.location.first
    else:
        try:
            found = pair.locator(pair.fed(inputs, seed), kind).locate(free=False, stop=True).first
        except ValueError:  # it has no layers
            found = ""
    return "" if found == WHOLE else found


def _of_layer(
    name: str,
    flax: nnx.Module,
    torch_side: "torch.nn.Module",
    inputs: tuple[np.ndarray, ...],
    options: _Options,
) -> Iterator[tuple[str, Draft]]:
    """Yields the drafts of one layer, unless it cannot be made alone."""
    spelled = options.rename(name) if options.rename else name
    # Inside a model of images some layers have the channels last in PyTorch, too.
    for layout in dict.fromkeys((options.layout, None)):
        with suppress(ValueError, KeyError, AttributeError):  # then the whole is shown
            own = options._replace(layout=layout)
            ours, theirs = interop.named_modules(flax)[spelled], torch_side.get_submodule(name)
            fed = _captured(torch_side, theirs, inputs, options.layout, layout)
            pair = Pair(ours, theirs, fed, layout=layout, weights=None)
            report = pair.judge(fed, dtypes=options.dtypes, seed=options.seed)
            for finding in _failing(report)[:3]:
                yield name, _draft(_Sides(ours, theirs, "", ""), fed, finding, own, pair)


def _captured(
    model: "torch.nn.Module",
    layer: "torch.nn.Module",
    inputs: tuple[np.ndarray, ...],
    layout: Layout,
    own: Layout,
) -> tuple[np.ndarray, ...]:
    """Returns what a model in training feeds a layer first, features last.

    Args:
      model: PyTorch's side.
      layer: a part of it.
      inputs: of the model.
      layout: of the model.
      own: of the layer.

    Raises:
      ValueError: if the layer is not called, or with keywords.
    """
    import torch

    kept: list[tuple[tuple[torch.Tensor, ...], dict[str, object]]] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True
    )
    state = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        model.double()
        tensors = [torch_tensor(channels_first(a, layout)) for a in inputs]
        with torch.no_grad():
            model(*(t.double() if t.is_floating_point() else t for t in tensors))
    finally:
        handle.remove()
        model.load_state_dict(state)
    check(bool(kept), "the layer must be called", layer=type(layer).__name__)
    args, kwargs = kept[0]
    named = sorted(kwargs)
    check(not named, "a script calls a layer without keywords", layer=type(layer).__name__,
          keywords=named, fix="Its model is shown instead.")  # fmt: skip
    return tuple(channels_last(numpy_of(t), own) for t in args)


def _failing(report: Report) -> list[Finding]:
    """Returns the findings that do not pass, those first that tell most."""

    def rank(finding: Finding) -> tuple[bool, int, int, float]:
        kind = next((i for i, k in enumerate(_KINDS) if finding.name.startswith(k)), len(_KINDS))
        step = re.match(r"step (\d+) ", finding.name)
        return finding.dtype != "float64", kind, int(step[1]) if step else 0, -finding.excess

    return sorted((f for f in report.findings if not f.passed), key=rank)


def _draft(
    sides: _Sides,
    inputs: tuple[np.ndarray, ...],
    finding: Finding,
    options: _Options,
    pair: Pair,
) -> Draft:
    low = [jnp.dtype(kind).name for kind in options.dtypes]
    stored = finding.dtype if finding.dtype in low else "float32" if "float32" in low else "float64"
    fed = tuple(round_to(a, stored) for a in inputs)
    mask = _mask(sides.torch)
    return Draft(
        source_of(sides.flax, sides.flax_source, "flax_source"),
        source_of(sides.torch, sides.torch_source, "torch_source"),
        _flax_arrays(sides.flax, stored),
        _torch_arrays(sides.torch, stored),
        fed,
        finding.name,
        finding.dtype,
        options.layout,
        pair.allowance(fed, finding.name, finding.dtype, options.seed),
        mask,
    )


def _flax_arrays(side: object, stored: str) -> dict[str, np.ndarray | None] | None:
    if not isinstance(side, nnx.Module):
        return None
    names, leaves = flax_leaves(side)
    arrays = [None if _is_random(a) else round_to(np.asarray(a), stored) for a in leaves]
    return dict(zip(names, arrays, strict=True))


def _is_random(leaf: PyTree) -> bool:
    return not isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _torch_arrays(side: object, stored: str) -> dict[str, np.ndarray] | None:
    if not is_module(side):
        return None
    state = side.state_dict()  # type: ignore[attr-defined]
    return {n: round_to(numpy_of(t).copy(), stored) for n, t in state.items()}


def _mask(side: object) -> float | None:
    """Returns the probability of a dropout, whose mask JAX's side gives.

    Raises:
      ValueError: if a random layer lies deeper: a script does not replay it.
    """
    import torch

    if not isinstance(side, torch.nn.Module):
        return None
    random = [m for m in side.modules() if torch_rate(m) > 0 or attention_rate(m) > 0]
    if random == [side] and type(side).__name__ in _DROPOUTS:
        return float(torch_rate(side))
    fix = "Set their probability to 0 on both sides."
    kinds = [type(m).__name__ for m in random]
    check(not random, "a script cannot replay random layers inside others", layers=kinds, fix=fix)
    return None


def _shrunk(draft: Draft, patience: float) -> Specimen | None:
    """Returns the smallest specimen that differs by its own bound; None if there is none."""
    try:
        if not differs(draft.specimen()):
            return None
    except ValueError:
        return None
    best, specimen = shrunk(draft, patience)
    if draft.dtype == "float64":  # whose bound has four digits to spare
        return specimen
    for one in (best, draft):
        with suppress(ValueError):
            pair = Pair(*one.built(), one.inputs, layout=one.layout, weights=None)
            bound = pair.allowance(one.inputs, one.name, one.dtype)
            judged = one.specimen()._replace(bound=bound)
            if differs(judged):
                return judged
    return None


def _written(specimen: Specimen, layer: str, target: Path) -> Reproduction:
    made = _scripted(specimen, layer)
    if made.arrays:
        write_whole(target.with_suffix(".npz"), lambda file: _save(file, made.arrays))
    write_whole(target, lambda file: file.write_text(made.text, encoding="utf-8"))
    quantity = f"{specimen.quantity.name} in {specimen.dtype}"
    shapes = tuple(a.shape for a in specimen.inputs)
    calls = specimen.flax.call.text, specimen.torch.call.text
    return Reproduction(target, quantity, layer, shapes, *calls)


def _scripted(specimen: Specimen, layer: str) -> Script:
    known = describe()["packages"]
    versions = known if isinstance(known, dict) else {}
    told = [f"{name} {versions.get(name)}" for name in ("jax", "flax", "optax", "torch")]
    title = textwrap.fill(
        f"{specimen.flax.call.text} beside {specimen.torch.call.text}: {specimen.quantity.name} "
        f"in {specimen.dtype} differs" + (f" ({layer})." if layer else "."),
        96,
    )
    by = textwrap.fill(f"Written by flaxstab {__version__} with {', '.join(told)}.", 96)
    return script(specimen, title, by)


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with file.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
