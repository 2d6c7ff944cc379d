"""A model with norms in every kind of container, and every way to convert them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxstab import linear, norms, surgery
from flaxstab.norms._kinds import NORMS
from parity_tests.support.cases import values

C = 4
X = jnp.asarray(values(6, 3, 3, C), jnp.float32)


def drawn(model: nnx.Module) -> nnx.Module:
    """Gives parameters and statistics, in place, values that no default hides."""
    for seed, (_, variable) in enumerate(nnx.iter_graph(model)):
        if isinstance(variable, nnx.Param | nnx.BatchStat) and variable.dtype != jnp.int32:
            new = np.abs(values(*variable.shape, seed=seed, offset=1.0, scale=0.2))
            variable[...] = jnp.asarray(new, variable.dtype)
    return model


class Net(nnx.Module):
    """Norms in attributes and in every kind of container, one behind a convolution."""

    def __init__(self, **options: object) -> None:
        rngs = nnx.Rngs(0)
        self.conv = linear.Conv(C, C, 1, bias=False, rngs=rngs)
        self.norm = norms.BatchNorm(C, **options)
        self.a_list = nnx.List([norms.BatchNorm(C), nnx.Dict(in_dict=norms.GhostBatchNorm(C, 4))])
        self.plain = nnx.data([{"k": (norms.BatchNorm(C), 3)}, jnp.ones(2)])
        self.net = nnx.Sequential(nnx.BatchNorm(C, rngs=rngs), nnx.relu)
        self.other = norms.LayerNorm(C)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.a_list[0](self.norm(self.conv(x)))
        x = self.plain[0]["k"][0](self.a_list[1].in_dict(x))
        return self.other(self.net(x))


def norms_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every norm of a model by its path."""
    found = nnx.iter_graph(model, graph=True)
    return {".".join(map(str, path)): node for path, node in found if isinstance(node, NORMS)}


CONVERSIONS: dict[str, Callable[[nnx.Module], nnx.Module]] = {
    "group": lambda m: surgery.replace_norms(m, surgery.batch_to_group(2)),
    "layer": lambda m: surgery.replace_norms(m, surgery.batch_to_layer()),
    "freeze": surgery.freeze_batch_norm,
    "unfreeze": surgery.unfreeze_batch_norm,
    "local": lambda m: surgery.convert_sync_batch_norm(m, None),
    "nothing": lambda m: surgery.replace_norms(m, lambda _: None),
}
