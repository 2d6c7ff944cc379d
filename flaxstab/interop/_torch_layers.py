"""PyTorch's layer types and how the twin of each is built: one table."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from flax import nnx

from flaxstab import attention, blocks, dropout, functional, initializers, linear, norms
from flaxstab._typing import DTypeLike
from flaxstab.interop._torch_functions import Applied, Function, Place

if TYPE_CHECKING:
    import torch

_ZEROS = initializers.zeros  # whatever is drawn is overwritten


class Part(NamedTuple):
    """One module of PyTorch's, and what its twin is built with.

    Attributes:
      module: the module.
      name: its name in the whole.
      param_dtype: dtype of its parameters and statistics.
      rngs: source of keys.
      function: from another module, or a function, to its twin as a function of one array.
    """

    module: "torch.nn.Module"
    name: str
    param_dtype: DTypeLike
    rngs: nnx.Rngs | None
    function: Callable[[object], Callable[..., object]]

    def require(self, condition: bool, rule: str, fix: str = "") -> None:
        """Raises a ``ValueError`` that names the module unless a condition holds."""
        if not condition:
            raise ValueError(refusal(self.module, self.name, rule, fix))

    def dropout_rngs(self, p: float) -> nnx.Rngs | None:
        """Returns the source of keys for a probability of dropping."""
        self.require(
            p == 0 or self.rngs is not None,
            "it drops, so it needs a source of keys",
            "Pass rngs=nnx.Rngs(seed).",
        )
        return self.rngs if p else None


class Kind(NamedTuple):
    """How the twin of one layer type is built.

    Attributes:
      build: makes it, without weights.
      takes: where its twin wants the features; ``None`` = anywhere.
      gives: where they are behind it; ``None`` = where they were.
      children: the types of its submodules by name: of another type they are refused.
    """

    build: Callable[[Part], nnx.Module]
    takes: Place | None = None
    gives: Callable[["torch.nn.Module"], Place | None] = lambda _: None
    children: Mapping[str, str] = {}


def refusal(module: object, name: str, rule: str, fix: str = "") -> str:
    """Returns the words of an error about one part of a model."""
    place = f"{name!r} " if name else ""
    return f"cannot make a twin of {place}{type(module).__name__}: {rule}." + (
        f" {fix}" if fix else ""
    )


def _linear(part: Part) -> nnx.Module:
    m = part.module
    return linear.Linear(
        m.in_features, m.out_features, m.bias is not None,
        kernel_init=_ZEROS, bias_init=_ZEROS, param_dtype=part.param_dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip


def _conv(part: Part) -> nnx.Module:
    m = part.module
    return linear.Conv(
        m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups,
        m.bias is not None, m.padding_mode, kernel_init=_ZEROS, bias_init=_ZEROS,
        param_dtype=part.param_dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip


def _conv_transpose(part: Part) -> nnx.Module:
    m = part.module
    return linear.ConvTranspose(
        m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.output_padding,
        m.groups, m.bias is not None, m.dilation, m.padding_mode,
        kernel_init=_ZEROS, bias_init=_ZEROS, param_dtype=part.param_dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip


def _embed(part: Part) -> nnx.Module:
    m = part.module
    part.require(
        m.max_norm is None, "max_norm changes the table during the lookup", "Set it to None."
    )
    part.require(
        not m.scale_grad_by_freq, "scale_grad_by_freq changes the gradient", "Set it to False."
    )
    part.require(not m.sparse, "JAX has no sparse gradients", "Set sparse to False.")
    return linear.Embed(
        m.num_embeddings, m.embedding_dim, m.padding_idx,
        embedding_init=_ZEROS, param_dtype=part.param_dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip


def _tracked(make: Callable[..., nnx.Module]) -> Callable[[Part], nnx.Module]:
    def build(part: Part) -> nnx.Module:
        m = part.module
        tracks = m.running_mean is not None
        part.require(
            bool(m.track_running_stats) == tracks,
            "track_running_stats was changed after it was built",
            "Build it with the value that it is to have.",
        )
        part.require(
            vars(m).get("process_group") is None,
            "a process group has no counterpart",
            "In JAX the batch is global under jit; or pass axis_name to norms.BatchNorm.",
        )
        return make(
            m.num_features, m.eps, m.momentum, m.weight is not None, tracks,
            bias=m.bias is not None, param_dtype=part.param_dtype,
        )  # fmt: skip

    return build


def _layer_norm(part: Part) -> nnx.Module:
    m = part.module
    return norms.LayerNorm(
        tuple(m.normalized_shape), m.eps, m.weight is not None, m.bias is not None,
        param_dtype=part.param_dtype,
    )  # fmt: skip


def _rms_norm(part: Part) -> nnx.Module:
    m = part.module
    shape = tuple(m.normalized_shape)
    return norms.RMSNorm(shape, m.eps, m.weight is not None, param_dtype=part.param_dtype)


def _group_norm(part: Part) -> nnx.Module:
    m = part.module
    return norms.GroupNorm(
        m.num_groups, m.num_channels, m.eps, m.weight is not None,
        bias=m.bias is not None, param_dtype=part.param_dtype,
    )  # fmt: skip


def _dropout(make: Callable[..., nnx.Module]) -> Callable[[Part], nnx.Module]:
    def build(part: Part) -> nnx.Module:
        return make(part.module.p, rngs=part.dropout_rngs(part.module.p))

    return build


def _prelu(part: Part) -> nnx.Module:
    shared = part.module.num_parameters == 1
    fix = "Call interop.register_twin for it."
    part.require(shared, "nnx.PReLU has one slope for all channels", fix)
    return nnx.PReLU(param_dtype=part.param_dtype)


def _require_batch_first(part: Part, attention: object) -> None:
    fix = "Build it with batch_first=True: its weights are the same."
    part.require(vars(attention)["batch_first"], "twins take (N, L, C)", fix)


def _attention(part: Part) -> nnx.Module:
    m = part.module
    _require_batch_first(part, m)
    return attention.MultiHeadAttention(
        m.embed_dim, m.num_heads, m.dropout, m.in_proj_bias is not None, m.bias_k is not None,
        m.add_zero_attn, m.kdim, m.vdim, kernel_init=_ZEROS, param_dtype=part.param_dtype,
        rngs=part.dropout_rngs(m.dropout) or nnx.Rngs(0),
    )  # fmt: skip


def _transformer_layer(make: Callable[..., nnx.Module]) -> Callable[[Part], nnx.Module]:
    def build(part: Part) -> nnx.Module:
        m = part.module
        _require_batch_first(part, m.self_attn)
        children = dict(m.named_children())
        drops = [c.p for n, c in children.items() if n.startswith("dropout")]
        drops += [children[n].dropout for n in ("self_attn", "multihead_attn") if n in children]
        alike = len(set(drops)) == 1
        part.require(alike, f"its parts must drop with one probability, got {drops}")
        epsilons = {c.eps for n, c in children.items() if n.startswith("norm")}
        part.require(len(epsilons) == 1, f"its norms must have one eps, got {sorted(epsilons)}")
        return make(
            m.self_attn.embed_dim, m.self_attn.num_heads, m.linear1.out_features, drops[0],
            part.function(m.activation), epsilons.pop(), True, m.norm_first,
            m.linear1.bias is not None, kernel_init=_ZEROS, param_dtype=part.param_dtype,
            rngs=part.dropout_rngs(drops[0]) or nnx.Rngs(0),
        )  # fmt: skip

    return build


def _applied(*options: str) -> Callable[[Part], nnx.Module]:
    def build(part: Part) -> nnx.Module:
        m, found = part.module, dict[str, object]()
        for option in options:
            value = getattr(m, option)
            found[option] = tuple(value) if isinstance(value, list | tuple) else value
        _check_options(part, found)
        return Applied(Function(type_name(m), tuple(found.items())))

    return build


def _check_options(part: Part, options: Mapping[str, object]) -> None:
    """Refuses options whose meaning has no counterpart."""
    indices = vars(part.module).get("return_indices", False)
    part.require(not indices, "the places of the maxima have no counterpart")
    dim = options.get("dim", 0)
    part.require(isinstance(dim, int), f"dim must be a number, got {dim!r}")
    padding = options.get("padding", 0)
    sizes = padding if isinstance(padding, tuple) else (padding,)
    part.require(min(sizes) >= 0, f"padding that cuts off has no counterpart, got {padding}")


def type_name(module: object) -> str:
    """Returns the name of the type in the table that a module computes as; '' if of none."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules.") and kind.__name__ in KINDS:
            return "" if overridden(type(module), kind) else kind.__name__
    return ""


def overridden(kind: type, base: type) -> list[str]:
    """Returns what of a type's base is another in it and decides about its result."""
    above = kind.__mro__[: kind.__mro__.index(base)]
    own = {name for part in above for name in vars(part)}
    return sorted(name for name in own - _HARMLESS if hasattr(base, name))


def own_code(module: object) -> str:
    """Returns the words for a module whose type is none of PyTorch's as it is."""
    kind = type(module)
    base = next((k for k in kind.__mro__ if k.__module__.startswith("torch.nn.modules.")), kind)
    names = overridden(kind, base)
    if not names or "forward" in names:
        return "it has a forward of its own"
    return f"it overrides {names[0]!r} of {base.__name__}"


_HARMLESS = {
    "__init__", "extra_repr", "__repr__", "reset_parameters", "_reset_parameters",
    "__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__constants__",
    "__firstlineno__", "__static_attributes__", "__slots__", "__parameters__", "__orig_bases__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__",
    "_abc_impl", "__qualname__", "__final__",
}  # fmt: skip
"""What a derived type may have of its own: no result depends on it."""


def _flattened(module: "torch.nn.Module") -> Place:
    return "flat" if (module.start_dim, module.end_dim) == (1, -1) else "torch"


def _behind_torch(_: "torch.nn.Module") -> Place:
    return "torch"


_POOLED = ("kernel_size", "stride", "padding", "ceil_mode")
_AVERAGED = (*_POOLED, "count_include_pad")
_ATTENTION = {"out_proj": "Linear"}
_DECODER = {
    "self_attn": "MultiheadAttention", "multihead_attn": "MultiheadAttention",
    "linear1": "Linear", "dropout": "Dropout", "linear2": "Linear",
    "norm1": "LayerNorm", "norm2": "LayerNorm", "norm3": "LayerNorm",
    "dropout1": "Dropout", "dropout2": "Dropout", "dropout3": "Dropout",
}  # fmt: skip
_ENCODER = {n: t for n, t in _DECODER.items() if n[-1] != "3" and n != "multihead_attn"}

KINDS: dict[str, Kind] = {
    "Linear": Kind(_linear, "torch"),
    "Embedding": Kind(_embed, "torch", _behind_torch),
    "LayerNorm": Kind(_layer_norm, "torch"),
    "RMSNorm": Kind(_rms_norm, "torch"),
    "GroupNorm": Kind(_group_norm, "last"),
    "SyncBatchNorm": Kind(_tracked(norms.BatchNorm), "last"),
    "Dropout": Kind(_dropout(dropout.Dropout)),
    "AlphaDropout": Kind(_dropout(dropout.AlphaDropout)),
    "PReLU": Kind(_prelu),
    "MultiheadAttention": Kind(_attention, "torch", children=_ATTENTION),
    "TransformerEncoderLayer": Kind(
        _transformer_layer(blocks.TransformerEncoderLayer), "torch", children=_ENCODER
    ),
    "TransformerDecoderLayer": Kind(
        _transformer_layer(blocks.TransformerDecoderLayer), "torch", children=_DECODER
    ),
    "Identity": Kind(_applied()),
    "Flatten": Kind(_applied("start_dim", "end_dim"), "torch", _flattened),
    "Unflatten": Kind(_applied("dim", "unflattened_size"), "torch", _behind_torch),
    **{
        f"{name}{rank}d": Kind(build, "last")
        for rank in (1, 2, 3)
        for name, build in {
            "Conv": _conv,
            "ConvTranspose": _conv_transpose,
            "BatchNorm": _tracked(norms.BatchNorm),
            "InstanceNorm": _tracked(norms.InstanceNorm),
            "Dropout": _dropout(dropout.ChannelDropout),
            "MaxPool": _applied(*_POOLED, "dilation"),
            "AvgPool": _applied(*_AVERAGED, *(() if rank == 1 else ("divisor_override",))),
            "AdaptiveAvgPool": _applied("output_size"),
            "ZeroPad": _applied("padding"),
            "ConstantPad": _applied("padding", "value"),
            "ReflectionPad": _applied("padding"),
            "ReplicationPad": _applied("padding"),
            "CircularPad": _applied("padding"),
        }.items()
    },
    **{
        name: Kind(_applied(*options), "torch" if "dim" in options else None)
        for name, options in {
            "CELU": ("alpha",), "ELU": ("alpha",), "GELU": ("approximate",), "GLU": ("dim",),
            "Hardshrink": ("lambd",), "Hardsigmoid": (), "Hardswish": (),
            "Hardtanh": ("min_val", "max_val"), "LeakyReLU": ("negative_slope",),
            "LogSigmoid": (), "LogSoftmax": ("dim",), "Mish": (), "ReLU": (), "ReLU6": (),
            "SELU": (), "SiLU": (), "Sigmoid": (), "Softmax": ("dim",), "Softmin": ("dim",),
            "Softplus": ("beta", "threshold"), "Softshrink": ("lambd",), "Softsign": (),
            "Tanh": (), "Tanhshrink": (), "Threshold": ("threshold", "value"),
        }.items()
    },
}  # fmt: skip

REASONS: dict[str, str] = {
    "Upsample": "jax.image.resize takes other samples (nearest from half-pixel centres, bilinear "
    "smoothed where it shrinks)",
    "LSTM": "its twin is nnx.RNN around nnx.OptimizedLSTMCell, which load_state_dict fills",
    "RNN": "its twin is nnx.RNN around nnx.SimpleCell, which load_state_dict fills",
    "GRU": "nnx.GRUCell has no bias inside the reset gate",
    "ResNet": "it has a forward of its own; flaxstab.models, once imported, knows torchvision's",
    "TransformerEncoder": "it is a loop over its layers, which have twins",
    "TransformerDecoder": "it is a loop over its layers, which have twins",
}
"""Why some types of PyTorch's have no twin."""

FUNCTIONS: dict[str, Callable[..., object]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
}
"""PyTorch's own functions, by name, that a Transformer layer may hold as its activation."""


def kind_dtype(name: str) -> jnp.dtype:
    """Returns JAX's dtype by the name of PyTorch's, such as ``'torch.bfloat16'``."""
    return jnp.dtype(name.removeprefix("torch."))
