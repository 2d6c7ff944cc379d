"""What the table of contracts needs beside the layers; without PyTorch, as that table runs."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from flaxstab import blocks, dropout, linear


def narrowings(program: ClosedJaxpr) -> list[str]:
    """Every step that casts float64 to a narrower float, or such a float to float64."""
    found = []
    for equation in steps(program):
        if equation.primitive.name == "convert_element_type":
            kinds = {str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)}
            # Scalars are constants: jax.random's own bounds are float32 in float64 runs too.
            scalar = equation.outvars[0].aval.ndim == 0
            if not scalar and "float64" in kinds and kinds & {"float32", "bfloat16", "float16"}:
                found.append(str(equation))
    return found


def steps(program: ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Every equation, those of inner programs included."""
    for equation in program.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values())):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield from steps(part)


class Embedded(nnx.Module):
    """An embedding as a map of floats: the rows that the input's largest elements name."""

    def __init__(self, features: int, **options: object) -> None:
        self.embed = linear.Embed(features, features, padding_idx=1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = self.embed(jnp.argmax(x, -1))
        return jnp.asarray(x, rows.dtype) * rows


class _Adding(nnx.RNNCellBase):
    """A cell that maps the sum of its state and its input."""

    def __init__(self, features: int, **options: object) -> None:
        self.linear = linear.Linear(features, features, **options)

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = self.linear(carry + inputs)
        return carry, carry


class Recurrent(nnx.Module):
    """A cell with dropout of its state as a map of sequences ``(N, T, C)``."""

    def __init__(self, features: int, p: float, **options: object) -> None:
        cell = _Adding(features, **options)
        self.cell = dropout.RecurrentDropoutCell(cell, p, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        carry, outputs = self.cell.start(x[:, 0]), []
        for step in range(1, x.shape[1] + 1):
            carry, y = self.cell(carry, x[:, step % x.shape[1]])
            outputs.append(y)
        return jnp.stack(outputs, 1)


class Decoder(nnx.Module):
    """A decoder layer whose memory is its own input."""

    def __init__(self, *arguments: float, **options: object) -> None:
        self.layer = blocks.TransformerDecoderLayer(*arguments, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x, x)
