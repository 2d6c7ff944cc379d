"""How layers of convolutional blocks follow each other, and what each step keeps.

A norm and its activation are computed again as the following convolution's input: of a
post-activation block the input and the convolutions' outputs are kept, of a pre-activation one the
input and the outputs of all convolutions but the last (``test_what_a_block_keeps``).
"""

from typing import Literal, cast

from flax import nnx

from flaxstab._checks import check
from flaxstab._typing import Array
from flaxstab.blocks._parts import Function
from flaxstab.blocks._residual import Add
from flaxstab.dropout import ChannelDropout
from flaxstab.linear import Conv
from flaxstab.norms._fused import region

Projects = Literal["raw", "activated"]


def check_projects(projects: str) -> None:
    """Raises a ``ValueError`` unless it is one of the two places that a skip can project."""
    known = ("raw", "activated")
    check(projects in known, "projects must be 'raw' or 'activated'", projects=projects)


def normed_conv(norm: nnx.Module, act: Function, conv: Conv, x: Array) -> Array:
    """Returns ``conv(act(norm(x)))`` and keeps ``x`` alone."""
    return region(lambda norm, conv, x: conv(act(norm(x))), (norm, conv), x)


def joined(
    norm: nnx.Module,
    act: Function,
    add: Add,
    branch: Array,
    x: Array,
    downsample: nnx.Sequential | None,
) -> Array:
    """Ends a post-activation block: ``act(norm(branch) + skip)``; keeps what it is given.

    Args:
      norm: the branch's last norm.
      act: the block's last activation.
      add: adds both.
      branch: the last convolution's output.
      x: the block's input.
      downsample: a convolution and a norm of the skip, where the shape changes.
    """
    if downsample is None:
        return region(lambda norm, add, b, x: act(add(x, norm(b))), (norm, add), branch, x)
    conv, skip_norm = downsample.layers[0], cast("nnx.Module", downsample.layers[1])
    return region(
        lambda norm, skip_norm, add, b, s: act(add(skip_norm(s), norm(b))),
        (norm, skip_norm, add),
        branch,
        conv(x),
    )


def projected(
    norm: nnx.Module, act: Function, conv: Conv, x: Array, skip: Conv | None, projects: str
) -> tuple[Array, Array]:
    """Begins a pre-activation block: returns ``conv(act(norm(x)))`` and the skip.

    Args:
      norm: the block's first norm.
      act: its activation.
      conv: its first convolution.
      x: its input.
      skip: the skip's convolution, where the shape changes.
      projects: whether that convolution sees the input or ``act(norm(x))``.
    """
    if skip is None or projects == "raw":
        return normed_conv(norm, act, conv, x), x if skip is None else skip(x)

    def both(norm: nnx.Module, conv: Conv, skip: Conv, x: Array) -> tuple[Array, Array]:
        h = act(norm(x))
        return conv(h), skip(h)

    return region(both, (norm, conv, skip), x)


def ended(
    norm: nnx.Module,
    act: Function,
    conv: Conv,
    drop: ChannelDropout,
    add: Add,
    x: Array,
    skip: Array,
) -> Array:
    """Ends a pre-activation block: ``skip + drop(conv(act(norm(x))))``; keeps ``x`` and the skip.

    Args:
      norm: the branch's last norm.
      act: its activation.
      conv: its last convolution.
      drop: drops channels of the branch.
      add: adds both.
      x: what the branch has come to.
      skip: what it is added to.
    """
    return region(
        lambda norm, conv, drop, add, x, skip: add(skip, drop(conv(act(norm(x))))),
        (norm, conv, drop, add),
        x,
        skip,
    )
