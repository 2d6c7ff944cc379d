"""Layers of which PyTorch packs several parts into one tensor: attention and recurrent ones."""

import numpy as np
from flax import nnx

from flaxstab._typing import Shape
from flaxstab.attention import MultiHeadAttention
from flaxstab.interop._entries import MATRIX, Arrays, Entry, Kind, inside, one, reshaped


def packed_attention(module: MultiHeadAttention) -> tuple[Entry, ...]:
    """Returns the entries of attention as ``torch.nn.MultiheadAttention``'s.

    With ``kdim`` or ``vdim`` of its own, torch keeps three weights instead of one.
    """
    size = module.embed_dim
    entries = _projections((size,), packed=module.kdim == module.vdim == size)
    rows = ("bias_k", "bias_v")
    moves = (reshaped((1, 1, size)), reshaped((size,)), "(1, 1, embed_dim) -> (embed_dim,)")
    return (*entries, *(one(name, name, *moves, rank=1) for name in rows))


def stock_attention(module: nnx.MultiHeadAttention) -> tuple[Entry, ...]:
    """Returns the entries of NNX's attention, whose kernels have an axis of heads.

    With ``in_kv_features`` of its own, torch keeps three weights instead of one.
    """
    packed = module.in_kv_features == module.in_features
    return _projections((module.num_heads, module.head_dim), packed=packed)


def _projections(out: Shape, packed: bool) -> tuple[Entry, ...]:
    """Returns the entries of the four projections.

    Args:
      out: the last axes of query, key and value kernels, and the first ones of ``out``'s.
      packed: whether torch keeps the weights of query, key and value in one tensor.
    """
    names = "(heads, head_dim)" if len(out) == 2 else "(embed_dim,)"
    wide, parts = names.strip("(),"), ("query", "key", "value")

    def to_weight(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(kernel.shape[0], -1).T  # (in, *out) -> (embed_dim, in)

    def to_kernel(weight: np.ndarray) -> np.ndarray:
        return weight.T.reshape(-1, *out)  # (embed_dim, in) -> (in, *out)

    words, rank, drawn = f"(embed_dim, in) -> (in, {wide})", 1 + len(out), Kind.KERNEL
    if packed:
        weights: tuple[Entry, ...] = (
            Entry(
                tuple(f"{part}.kernel" for part in parts),
                ("in_proj_weight",),
                lambda kernels: (np.concatenate([to_weight(k) for k in kernels]),),
                lambda packed: tuple(to_kernel(w) for w in np.split(packed[0], 3)),
                f"three, each {words}",
                rank,
                kind=drawn,
            ),
        )
    else:
        weights = tuple(
            one(
                f"{part}.kernel", f"{part[0]}_proj_weight", to_weight, to_kernel, words, rank, drawn
            )
            for part in parts
        )
    bias = Entry(
        tuple(f"{part}.bias" for part in parts),
        ("in_proj_bias",),
        lambda biases: (np.concatenate([b.ravel() for b in biases]),),
        lambda packed: tuple(b.reshape(out) for b in np.split(packed[0], 3)),
        f"three, each (embed_dim,) -> {names}",
        len(out),
    )
    kernel = one(
        "out.kernel",
        "out_proj.weight",
        lambda kernel: kernel.reshape(-1, kernel.shape[-1]).T,  # (*out, embed_dim) -> (out, in)
        lambda weight: weight.T.reshape(*out, -1),
        f"(out, embed_dim) -> ({wide}, out)",
        rank,
        drawn,
    )
    return (*weights, bias, kernel, one("out.bias", "out_proj.bias", rank=1))


def attention_refusal(module: nnx.MultiHeadAttention) -> str:
    """Returns why ``torch.nn.MultiheadAttention`` cannot be this layer, or ''."""
    if module.num_kv_heads != module.num_heads:
        return "torch.nn.MultiheadAttention has num_kv_heads = num_heads"
    if not module.in_features == module.qkv_features == module.out_features:
        return "torch.nn.MultiheadAttention has in_features = qkv_features = out_features"
    return "torch.nn.MultiheadAttention has no normalize_qk" if module.normalize_qk else ""


def linear_general_refusal(module: nnx.LinearGeneral) -> str:
    """Returns why ``torch.nn.Linear`` cannot be this layer, or ''."""
    sizes = (len(module.in_features), len(module.out_features), len(module.batch_axis))
    if sizes != (1, 1, 0) or module.axis != (-1,):
        return "torch.nn.Linear maps one axis, the last, to one axis"
    return ""


def _bias(*variables: str) -> Entry:
    """Returns the entry of a bias that torch keeps as a sum of two.

    It goes out as (bias, 0): the round trip from Flax keeps every bit, also the sign of zero.
    """

    def to_torch(parts: Arrays) -> Arrays:
        bias = np.concatenate(parts)
        return bias, np.zeros_like(bias)

    def to_flax(pair: Arrays) -> Arrays:
        first, second = pair
        return tuple(np.split(np.where(second == 0, first, first + second), len(variables)))

    def gradient(parts: Arrays) -> Arrays:
        of_sum = np.concatenate(parts)
        return of_sum, of_sum

    words = "the sum, split by gate"
    return Entry(variables, ("bias_ih", "bias_hh"), to_torch, to_flax, words, 1, gradient)


def _gates(tensor: str, *variables: str) -> Entry:
    return Entry(
        variables,
        (tensor,),
        lambda kernels: (np.concatenate([kernel.T for kernel in kernels]),),
        lambda weight: tuple(part.T for part in np.split(weight[0], len(variables))),
        "(gates x hidden, in) -> (in, hidden), split by gate",
        rank=2,
        kind=Kind.KERNEL,
    )


_DENSE = (
    MATRIX._replace(variables=("dense_i.kernel",), tensors=("weight_ih",)),
    MATRIX._replace(variables=("dense_h.kernel",), tensors=("weight_hh",)),
)

CELLS: dict[type[nnx.Module], tuple[Entry, ...]] = {
    nnx.LSTMCell: (
        _gates("weight_ih", "ii.kernel", "if_.kernel", "ig.kernel", "io.kernel"),
        _gates("weight_hh", "hi.kernel", "hf.kernel", "hg.kernel", "ho.kernel"),
        _bias("hi.bias", "hf.bias", "hg.bias", "ho.bias"),
    ),
    nnx.OptimizedLSTMCell: (*_DENSE, _bias("dense_h.bias")),
    nnx.SimpleCell: (*_DENSE, _bias("dense_i.bias")),
}
"""The entries of each recurrent cell as ``torch.nn.LSTMCell``'s or ``torch.nn.RNNCell``'s."""


def cell_refusal(cell: nnx.Module) -> str:
    """Returns why PyTorch has no such recurrent cell, or ''."""
    if isinstance(cell, nnx.GRUCell):
        return "nnx.GRUCell has no place for b_hn, the bias that torch.nn.GRUCell resets"
    if isinstance(cell, nnx.SimpleCell) and cell.residual:
        return "torch.nn.RNNCell has no residual"
    return ""


def recurrent(module: object) -> tuple[Entry, ...]:
    """Returns the entries of a recurrent layer as ``torch.nn.LSTM``'s or ``torch.nn.RNN``'s."""
    return tuple(inside(entry, "cell", "_l0") for entry in CELLS[type(vars(module)["cell"])])


def bidirectional(module: nnx.Bidirectional) -> tuple[Entry, ...]:
    """Returns the entries of two recurrent layers as torch's with ``bidirectional=True``."""
    forward = (inside(entry, "forward_rnn") for entry in recurrent(module.forward_rnn))
    backward = (inside(e, "backward_rnn", "_reverse") for e in recurrent(module.backward_rnn))
    return (*forward, *backward)


def is_recurrent(module: object) -> bool:
    """Whether a module is a recurrent layer of a cell that PyTorch has.

    Another one is a mere container: its cell is walked.
    """
    known = isinstance(module, nnx.RNN) and type(module.cell) in CELLS
    return known and not cell_refusal(vars(module)["cell"])


def is_bidirectional(module: nnx.Bidirectional) -> bool:
    """Whether both layers are recurrent ones of a cell that PyTorch has."""
    return is_recurrent(module.forward_rnn) and is_recurrent(module.backward_rnn)
