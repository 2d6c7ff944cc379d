"""The table of layers: every exported one is a row, in a configuration that keeps the shape."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flaxstab import attention, blocks, dropout, linear, norms
from parity_tests.support.cases import values
from parity_tests.support.contracts import Decoder, Embedded, Recurrent

C = 4


class Row(NamedTuple):
    """One configuration of a layer whose output has its input's shape.

    Attributes:
      layer: the class.
      make: builds it from keyword options.
      shape: an input's shape.
      mode: the keyword of its mode, or '' for a layer without one.
      follows: whether the output has the input's dtype; otherwise that of the parameters.
    """

    layer: type[nnx.Module]
    make: Callable[..., nnx.Module]
    shape: tuple[int, ...] = (5, 3, C)
    mode: str = ""
    follows: bool = True

    def build(self, seed: int = 0, **options: object) -> nnx.Module:
        return self.make(rngs=nnx.Rngs(seed), **options)

    def input(self, dtype: object = jnp.float32, seed: int = 0) -> jax.Array:
        return jnp.asarray(values(*self.shape, seed=seed), dtype)

    def output_dtype(self, dtype: str) -> str:
        return dtype if self.follows else "float32"


WIRING = blocks.Residual(scale=0.1, layer_scale=0.5)
RUNNING, DROPPING = "use_running_average", "deterministic"
ROWS = {
    "BatchNorm": Row(norms.BatchNorm, lambda **o: norms.BatchNorm(C, **o), mode=RUNNING),
    "BatchNorm cumulative": Row(
        norms.BatchNorm, lambda **o: norms.BatchNorm(C, momentum=None, **o), mode=RUNNING
    ),
    "GhostBatchNorm": Row(
        norms.GhostBatchNorm, lambda **o: norms.GhostBatchNorm(C, 3, **o), mode=RUNNING
    ),
    "InstanceNorm tracked": Row(
        norms.InstanceNorm,
        lambda **o: norms.InstanceNorm(C, affine=True, track_running_stats=True, **o),
        mode=RUNNING,
    ),
    "InstanceNorm": Row(norms.InstanceNorm, lambda **o: norms.InstanceNorm(C, **o)),
    "LayerNorm": Row(norms.LayerNorm, lambda **o: norms.LayerNorm((3, C), **o)),
    "FrozenBatchNorm": Row(norms.FrozenBatchNorm, lambda **o: norms.FrozenBatchNorm(C, **o)),
    "RMSNorm": Row(norms.RMSNorm, lambda **o: norms.RMSNorm((3, C), **o)),
    "GroupNorm": Row(norms.GroupNorm, lambda **o: norms.GroupNorm(2, C, **o)),
    "Dropout": Row(dropout.Dropout, lambda **o: dropout.Dropout(0.5, **o), mode=DROPPING),
    "ChannelDropout": Row(
        dropout.ChannelDropout, lambda **o: dropout.ChannelDropout(0.5, **o), mode=DROPPING
    ),
    "AlphaDropout": Row(
        dropout.AlphaDropout, lambda **o: dropout.AlphaDropout(0.5, **o), mode=DROPPING
    ),
    "DropPath": Row(dropout.DropPath, lambda **o: dropout.DropPath(0.5, **o), mode=DROPPING),
    "RecurrentDropout": Row(
        dropout.RecurrentDropout, lambda **o: dropout.RecurrentDropout(0.5, **o), mode=DROPPING
    ),
    "RecurrentDropoutCell": Row(
        dropout.RecurrentDropoutCell, lambda **o: Recurrent(C, 0.5, **o), mode=DROPPING
    ),
    # XLA's CPU compiler takes ten times as long for dropout masks with shorter rows.
    "MultiHeadAttention": Row(
        attention.MultiHeadAttention,
        lambda **o: attention.MultiHeadAttention(C, 2, 0.5, add_bias_kv=True, **o),
        (1, 255, C),
        DROPPING,
    ),
    "BasicBlock": Row(
        blocks.BasicBlock, lambda **o: blocks.BasicBlock(C, C, **o), (5, 3, 3, C), RUNNING
    ),
    "PreActResBlock": Row(
        blocks.PreActResBlock,
        lambda **o: blocks.PreActResBlock(C, C, 2, drop=0.5, **o),
        (5, 3, 3, C),
        DROPPING,
    ),
    "Bottleneck": Row(
        blocks.Bottleneck, lambda **o: blocks.Bottleneck(C, 1, **o), (5, 3, 3, C), RUNNING
    ),
    "PreActBottleneck": Row(
        blocks.PreActBottleneck,
        lambda **o: blocks.PreActBottleneck(C, 1, residual=WIRING, **o),
        (5, 3, 3, C),
        RUNNING,
    ),
    "ConvNormAct": Row(
        blocks.ConvNormAct, lambda **o: blocks.ConvNormAct(C, C, (3,), **o), mode=RUNNING
    ),
    "TransformerBlock": Row(
        blocks.TransformerBlock,
        lambda **o: blocks.TransformerBlock(C, 2, 2, 0.5, **o),
        mode=DROPPING,
    ),
    "TransformerEncoderLayer": Row(
        blocks.TransformerEncoderLayer,
        lambda **o: blocks.TransformerEncoderLayer(C, 2, 6, 0.5, **o),
        mode=DROPPING,
    ),
    "TransformerDecoderLayer": Row(
        blocks.TransformerDecoderLayer, lambda **o: Decoder(C, 2, 6, 0.5, **o), mode=DROPPING
    ),
    "MLP": Row(blocks.MLP, lambda **o: blocks.MLP(C, 6, drop=0.5, **o), mode=DROPPING),
    "Linear": Row(linear.Linear, lambda **o: linear.Linear(C, C, **o)),
    "Conv": Row(linear.Conv, lambda **o: linear.Conv(C, C, (3,), padding=1, **o)),
    "ConvTranspose": Row(
        linear.ConvTranspose, lambda **o: linear.ConvTranspose(C, C, (3,), padding=1, **o)
    ),
    "Embed": Row(linear.Embed, lambda **o: Embedded(C, **o), follows=False),
}
