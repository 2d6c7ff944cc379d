"""Where two models differ: the function that users call."""

from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from flaxstab import interop
from flaxstab._typing import DTypeLike
from flaxstab.parity._carry import Weights
from flaxstab.parity._inputs import Layout
from flaxstab.parity._layers import Location
from flaxstab.parity._models import Pair
from flaxstab.parity._options import check_dtypes, check_options
from flaxstab.parity._torch_side import Rename

if TYPE_CHECKING:
    import torch


def locate(
    flax_model: nnx.Module,
    torch_model: "torch.nn.Module",
    *inputs: np.ndarray,
    layout: Layout = None,
    weights: Weights = "torch",
    rename: Rename | None = None,
    dtype: DTypeLike = np.float64,
    seed: int = 0,
) -> Location:
    """Finds the first layer of two models that differs, forward and backward.

    Both models run with every submodule's calls recorded. Then each Flax layer is given, alone,
    what PyTorch's layer of its name was given: its inputs and, going back, the gradients of its
    outputs. Its *own* error is what differs then (output, statistics, gradients of inputs and
    parameters, evaluation after them), judged as :func:`compare` judges whole models; what it
    *inherits* is seen where it stands, in the same unit. Children are judged before their parents,
    and a module that holds a differing one is not run. Dropout layers replay their draws.

    Args:
      flax_model: an NNX module. Neither model is changed.
      torch_model: its counterpart.
      *inputs: arrays for both sides, features last.
      layout: as of :func:`compare`. A layer's own layout follows from its shapes and its type.
      weights: as of :func:`compare`.
      rename: as of :func:`compare`; modules are matched by what becomes of their tensors' names.
      dtype: a lower precision to judge against float64, as ``compare`` does, beside the meaning in
        float64; float64 = the meaning alone.
      seed: of the cotangents.

    Returns:
      Each layer's errors in both directions and the first layer that differs; printable.

    Raises:
      ValueError: as :func:`compare`. A layer that cannot be run alone is no error: it is 'unknown'
        in the result, with the reason.

    Example:
      >>> import numpy, torch
      >>> from flaxstab import linear
      >>> torch_model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(linear.Linear(4, 4, rngs=rngs), linear.Linear(4, 2, rngs=rngs))
      >>> found = locate(model, torch_model, numpy.eye(4))
      >>> found.first, [layer.name for layer in found.layers]
      ('', ['0', '1', '(model)', '(model)', '1', '0'])
    """
    check_options(layout, weights, rename)
    wide = dtype in (None, np.float64, "float64")
    check_dtypes(() if wide else (dtype,))
    arrays = tuple(interop.to_numpy(a) for a in inputs)
    pair = Pair(flax_model, torch_model, arrays, layout=layout, weights=weights, rename=rename)
    return pair.locator(pair.fed(arrays, seed), np.float64 if wide else dtype).locate()
