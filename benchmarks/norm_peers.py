"""The norms of flaxstab, flax.nnx, equinox and PyTorch, ready to be counted and timed."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import functional
from parity_tests.support.kept import kept_bytes

EPS, GROUPS = 1e-5, 32
IMAGE_NORMS = ("BatchNorm", "GroupNorm", "InstanceNorm")

Norm = Callable[..., jax.Array]
Figures = dict[str, float]
OURS: dict[str, Norm] = {
    "LayerNorm": lambda x, *affine: functional.layer_norm(x, x.shape[-1:], *affine, eps=EPS),
    "RMSNorm": lambda x, *affine: functional.rms_norm(x, x.shape[-1:], *affine, eps=EPS),
    "BatchNorm": lambda x, *affine: functional.batch_norm(x, *affine, eps=EPS)[0],
    "GroupNorm": lambda x, *affine: functional.group_norm(x, GROUPS, *affine, eps=EPS),
    "InstanceNorm": lambda x, *affine: functional.instance_norm(x, *affine, eps=EPS)[0],
}


class Case(NamedTuple):
    """A norm, the dtype of its input, and the features-last input with all that goes with it.

    Attributes:
      norm: its name.
      dtype: of the input and the output.
      x: the input, in float32.
      cotangent: of the output, in float32.
      affine: scale and bias, or scale alone for RMSNorm, in float32.
    """

    norm: str
    dtype: str
    x: np.ndarray
    cotangent: np.ndarray
    affine: tuple[np.ndarray, ...]


class Peer(NamedTuple):
    """One way to compute a case.

    Attributes:
      name: the package, and the choice made in it.
      forward: computes the output.
      both: computes the output and all gradients.
      wait: blocks until what either returned is there.
      figures: what was counted rather than timed.
    """

    name: str
    forward: Callable[[], object]
    both: Callable[[], object]
    wait: Callable[[object], object]
    figures: Figures


def stock(norm: str, channels: int, dtype: str, fast: bool) -> Norm:
    """Returns flax.nnx's layer as a function, with its default or its stable variance."""
    options = {"epsilon": EPS, "dtype": dtype, "use_fast_variance": fast, "rngs": nnx.Rngs(0)}
    if norm == "GroupNorm":
        options["num_groups"] = GROUPS
    graph, params, rest = nnx.split(getattr(nnx, norm)(channels, **options), nnx.Param, ...)

    def apply(x: jax.Array, scale: jax.Array, *bias: jax.Array) -> jax.Array:
        given = jax.tree.unflatten(jax.tree.structure(params), [*bias, scale])  # by name
        return nnx.merge(graph, given, rest, copy=True)(x)

    return apply


def equinox_norm(eqx: ModuleType, norm: str, channels: int) -> Norm:
    """Returns equinox's layer as a function of channels-first samples in a batch."""
    if norm == "BatchNorm":
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        layer, state = make(channels, "batch", EPS, mode="batch")
    elif norm in ("GroupNorm", "InstanceNorm"):
        layer = eqx.nn.GroupNorm(GROUPS if norm == "GroupNorm" else channels, channels, EPS)
    else:
        layer = getattr(eqx.nn, norm)(channels, EPS, use_bias=norm == "LayerNorm")

    def apply(x: jax.Array, *affine: jax.Array) -> jax.Array:
        given = eqx.tree_at(lambda part: (part.weight, part.bias)[: len(affine)], layer, affine)
        if norm != "BatchNorm":
            return jax.vmap(given)(x)
        y, _ = jax.vmap(given, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
        return jnp.asarray(y, x.dtype)

    return apply


def program_figures(compiled: jax.stages.Compiled, size: int) -> Figures:
    """Counts what XLA made of a program; it counts the bytes of a loop's body once."""
    text = compiled.as_text()
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / size,
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"] / size,
        "fusions": len(re.findall(r" fusion\(", text)),
        "loops": len(re.findall(r" while\(", text)),
    }


def jax_peer(name: str, f: Norm, case: Case, channels_first: bool = False) -> Peer:
    """Compiles a JAX function and its gradients for a case."""
    arrays = [np.moveaxis(a, -1, 1) if channels_first else a for a in (case.x, case.cotangent)]
    x, cotangent = (jnp.array(a, case.dtype) for a in arrays)
    affine = tuple(map(jnp.array, case.affine))

    def value_and_gradients(cotangent: jax.Array, *args: jax.Array) -> object:
        y, pullback = jax.vjp(f, *args)
        return y, pullback(cotangent)

    forward = jax.jit(f).lower(x, *affine).compile()
    both = jax.jit(value_and_gradients).lower(cotangent, x, *affine).compile()
    kept = kept_bytes(f, x, *affine, parameters=affine) / x.nbytes
    return Peer(
        name,
        partial(forward, x, *affine),
        partial(both, cotangent, x, *affine),
        jax.block_until_ready,
        {"kept": kept, **program_figures(both, x.nbytes)},
    )


def torch_norm(torch: ModuleType, norm: str) -> Callable[..., object]:
    """Returns PyTorch's function."""
    F = torch.nn.functional  # noqa: N806
    return {
        "LayerNorm": lambda x, *affine: F.layer_norm(x, x.shape[-1:], *affine, EPS),
        "RMSNorm": lambda x, *affine: F.rms_norm(x, x.shape[-1:], *affine, EPS),
        "BatchNorm": lambda x, *affine: F.batch_norm(x, None, None, *affine, True, 0.1, EPS),
        "GroupNorm": lambda x, *affine: F.group_norm(x, GROUPS, *affine, EPS),
        "InstanceNorm": lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=EPS),
    }[norm]


def torch_kept(
    torch: ModuleType, f: Callable[..., object], x: object, affine: Sequence[object]
) -> int:
    """Returns the bytes that autograd saves, each storage once and parameters left out."""
    held = {}

    def pack(tensor: object) -> object:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = f(x, *affine)
    for parameter in affine:
        held.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in held.values())


def torch_peer(torch: ModuleType, layout: str, case: Case, compiled: bool) -> Peer:
    """Prepares PyTorch's function for a case, in a layout of images or as rows."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, case.dtype)
    # Its fast paths take float32 parameters beside 16-bit images here, equal dtypes elsewhere.
    narrow = torch.float32 if case.norm in ("BatchNorm", "InstanceNorm") else dtype

    def tensor(array: np.ndarray) -> object:
        moved = torch.tensor(array, device=device).to(dtype)
        if not layout:
            return moved
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return moved.movedim(-1, 1).contiguous(memory_format=form)

    f = torch_norm(torch, case.norm)
    if compiled:
        torch.compiler.reset()
        f = torch.compile(f, dynamic=False)
    x, cotangent = tensor(case.x).requires_grad_(), tensor(case.cotangent)
    affine = [torch.tensor(a, device=device).to(narrow).requires_grad_() for a in case.affine]

    def forward() -> object:
        with torch.no_grad():
            return f(x, *affine)

    def both() -> object:
        y = f(x, *affine)
        return y, torch.autograd.grad(y, (x, *affine), cotangent)

    _ = forward(), both()  # what cannot be compiled fails here
    name = " ".join(["torch.compile" if compiled else "torch", *filter(None, [layout])])
    kept = torch_kept(torch, f, x, affine) / (x.numel() * x.element_size())
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    return Peer(name, forward, both, lambda _: wait(), {"kept": kept})


def makers(
    case: Case, eqx: ModuleType | None, torch: ModuleType | None, compiled: bool
) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Yields every peer of a case with what prepares it."""
    channels, images = case.x.shape[-1], case.norm in IMAGE_NORMS
    yield "flaxstab", lambda: jax_peer("flaxstab", OURS[case.norm], case)
    for name, fast in (("nnx stable", False), ("nnx default", True)):
        f = stock(case.norm, channels, case.dtype, fast)
        yield name, partial(jax_peer, name, f, case)
    if eqx is not None:
        f = equinox_norm(eqx, case.norm, channels)
        yield "equinox", partial(jax_peer, "equinox", f, case, images)
    if torch is not None:
        for through in (False, True)[: 1 + compiled]:
            for layout in ("NCHW", "channels_last") if images else ("",):
                name = f"torch{'.compile' * through} {layout}".rstrip()
                yield name, partial(torch_peer, torch, layout, case, through)
