"""Weight initialisation by formula: document 1, "weight initialisation", and document 2, B.

Every function fills a tensor in place and returns it, like ``torch.nn.init``, and draws the same
numbers from the same seed.
"""

import math

import torch
from torch import Tensor, nn

_GAINS = {
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4.0,
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), 1.0),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1.0),
}
_XAVIER = ("tanh", "sigmoid", "linear")


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """Gain of an activation; leaky ReLU of slope a has sqrt(2 / (1 + a**2)) (document 2, B-3).

    Args:
        nonlinearity: Name of the activation, as ``torch.nn.functional`` calls it.
        param: Slope of ``leaky_relu``; None means 0.01. Other activations ignore it.

    Returns:
        The factor on the standard deviation of the weights.

    Raises:
        ValueError: The activation has no gain (GELU and ELU: the documents use ReLU's).
    """
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2.0 / (1.0 + slope**2))
    if nonlinearity not in _GAINS:
        known = ", ".join(sorted([*_GAINS, "leaky_relu"]))
        raise ValueError(
            f"nonlinearity must have a known gain, got {nonlinearity!r}; use one of {known}."
        )
    return _GAINS[nonlinearity]


def fan_in_and_fan_out(weight: Tensor) -> tuple[int, int]:
    """Inputs and outputs of one unit: (C_in, C_out) times the window (document 2, B-4).

    Args:
        weight: ``(out, in)`` or ``(out, in, *window)``.

    Returns:
        ``(fan_in, fan_out)``.

    Raises:
        ValueError: The weight has fewer than two axes.
    """
    if weight.ndim < 2:
        raise ValueError(
            f"a fan needs a weight of 2 or more axes, got shape {tuple(weight.shape)}; "
            "give biases a constant instead."
        )
    window = math.prod(weight.shape[2:])
    return weight.shape[1] * window, weight.shape[0] * window


def constant_(tensor: Tensor, value: float) -> Tensor:
    """Every element is ``value`` (document 1, constant initialisation).

    The document says that equal weights cause "symmetry breaking"; they fail to break the symmetry:
    all units of the layer stay equal under training. Meant for biases (0 or 0.01).
    """
    with torch.no_grad():
        return tensor.fill_(value)


def zeros_(tensor: Tensor) -> Tensor:
    """Every element is 0 (document 1, constant initialisation)."""
    return constant_(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """Every element is 1 (document 1, constant initialisation)."""
    return constant_(tensor, 1.0)


def eye_(tensor: Tensor) -> Tensor:
    """Identity matrix (document 1, constant initialisation).

    Raises:
        ValueError: The tensor does not have two axes.
    """
    if tensor.ndim != 2:
        raise ValueError(
            f"eye_ fills a matrix, got shape {tuple(tensor.shape)}; "
            "use dirac_ for convolution weights."
        )
    with torch.no_grad():
        zeros_(tensor).diagonal().fill_(1.0)
    return tensor


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """Dirac delta: the convolution hands its input channels through (document 1, constants).

    The one stands at ``size // 2`` of every window axis, also where the window is even.

    Args:
        tensor: Convolution weight ``(out, in / groups, *window)`` with 1 to 3 window axes.
        groups: Groups of the convolution; each group starts again at its first channel.

    Returns:
        The tensor.

    Raises:
        ValueError: Wrong number of axes, or ``groups`` does not divide the outputs.
    """
    if tensor.ndim not in (3, 4, 5):
        raise ValueError(
            f"dirac_ fills a convolution weight of 3 to 5 axes, got shape {tuple(tensor.shape)}; "
            "use eye_ for a matrix."
        )
    if tensor.shape[0] % groups != 0:
        raise ValueError(
            f"groups must divide the output channels, got groups={groups} and "
            f"{tensor.shape[0]} channels; change one of them."
        )
    per_group = tensor.shape[0] // groups
    centre = [size // 2 for size in tensor.shape[2:]]
    zeros_(tensor)
    for group in range(groups):
        for channel in range(min(per_group, tensor.shape[1])):
            ones_(tensor[(group * per_group + channel, channel, *centre)])
    return tensor


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """U(a, b) (document 1, random initialisation)."""
    with torch.no_grad():
        return tensor.uniform_(a, b)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """N(mean, std**2) (document 1, random initialisation)."""
    with torch.no_grad():
        return tensor.normal_(mean, std)


def _standard_normal_cdf(x: float) -> float:
    return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0


def _redraw_normal(tensor: Tensor, mean: float, std: float, a: float, b: float) -> Tensor:
    """Redraw what lies outside [a, b] until nothing does: for [a, b] that hold the mass."""
    low, high = tensor.new_tensor([a, b]).tolist()
    result = torch.empty_like(tensor).normal_(mean, std)
    while (outside := (result < low) | (result > high)).any():
        result = torch.where(outside, torch.empty_like(result).normal_(mean, std), result)
    return result


def _reject_uniform(tensor: Tensor, mean: float, std: float, a: float, b: float) -> Tensor:
    """Accept U(a, b) with probability density / peak: for bounds far out in the tail."""
    peak = -0.5 * ((max(a, min(mean, b)) - mean) / std) ** 2
    result = torch.empty_like(tensor)
    pending = torch.ones_like(tensor, dtype=torch.bool)
    while pending.any():
        result = torch.where(pending, torch.empty_like(tensor).uniform_(a, b), result)
        log_ratio = ((result - mean) / std) ** 2 * -0.5 - peak
        pending = pending & (torch.empty_like(tensor).uniform_().log() > log_ratio)
    return result


def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Tensor:
    """N(mean, std**2) restricted to [a, b] (document 1, random initialisation).

    The bounds are absolute, not in units of ``std``, and the spread is not corrected for what the
    truncation takes away. torch 2.12 and later draw by rejection; so does this.

    Args:
        tensor: The tensor to fill.
        mean: Mean before truncation.
        std: Standard deviation before truncation.
        a: Smallest value.
        b: Largest value.

    Returns:
        The tensor.
    """
    inside = _standard_normal_cdf((b - mean) / std) - _standard_normal_cdf((a - mean) / std)
    # 0.3 is torch's border between the two ways of drawing
    draw = _redraw_normal if inside > 0.3 else _reject_uniform
    with torch.no_grad():
        return tensor.copy_(draw(tensor, mean, std, a, b))


def sparse_(tensor: Tensor, sparsity: float, std: float = 0.01) -> Tensor:
    """Normal weights with ``ceil(sparsity * rows)`` zeros in every column (document 1).

    The document writes N(0, 0.01): 0.01 is the standard deviation, not the variance.

    Args:
        tensor: A matrix ``(out, in)``.
        sparsity: Fraction of zeros per column, 0 to 1.
        std: Standard deviation of the rest.

    Returns:
        The tensor.

    Raises:
        ValueError: The tensor does not have two axes.
    """
    if tensor.ndim != 2:
        raise ValueError(
            f"sparse_ fills a matrix, got shape {tuple(tensor.shape)}; flatten the window first."
        )
    rows, columns = tensor.shape
    normal_(tensor, 0.0, std)
    for column in range(columns):
        zeros = torch.randperm(rows)[: math.ceil(sparsity * rows)]
        with torch.no_grad():
            tensor[zeros, column] = 0.0
    return tensor


def _xavier_std(tensor: Tensor, gain: float) -> float:
    return gain * math.sqrt(2.0 / sum(fan_in_and_fan_out(tensor)))


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """U(-a, a), a = gain * sqrt(6 / (fan_in + fan_out)) (documents 1 and 2, B-2).

    Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, 2010.
    """
    # sqrt(3) * std, torch's order of rounding, so that the numbers agree bit for bit
    bound = math.sqrt(3.0) * _xavier_std(tensor, gain)
    return uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """N(0, std**2), std = gain * sqrt(2 / (fan_in + fan_out)) (documents 1 and 2, B-2)."""
    return normal_(tensor, 0.0, _xavier_std(tensor, gain))


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', got {mode!r}; choose one.")
    fan = fan_in_and_fan_out(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


def kaiming_uniform_(
    tensor: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """U(-bound, bound), bound = gain * sqrt(3 / fan) (document 1, Kaiming initialisation).

    Document 1 prints gain * 3 / fan_in, without the root; the root is right: only with it does the
    variance become gain**2 / fan_in, as the document's own normal form has it.
    He et al.: Delving deep into rectifiers, 2015, arXiv 1502.01852.

    Args:
        tensor: Weight ``(out, in, *window)``.
        a: Slope of the leaky ReLU behind the layer.
        mode: 'fan_in' keeps the forward variance, 'fan_out' the backward one.
        nonlinearity: The activation behind the layer.

    Returns:
        The tensor.
    """
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound)


def kaiming_normal_(
    tensor: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Tensor:
    """N(0, std**2), std = gain / sqrt(fan) (documents 1 and 2, B-3); arguments as the uniform."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity))


def orthogonal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Rows or columns, whichever are fewer, orthonormal times ``gain`` (documents 1 and 2, B-7).

    By QR of a normal matrix with the signs of R's diagonal moved into Q, which makes Q uniform over
    the orthogonal matrices; document 1 names the SVD. Document 1 advises against feed-forward
    networks, document 2 finds it useful for linear layers: nothing here stops either use.

    Args:
        tensor: Weight ``(out, in, *window)``; the window is flattened into ``in``.
        gain: Factor on the orthogonal matrix.

    Returns:
        The tensor.

    Raises:
        ValueError: The tensor has fewer than two axes.
    """
    if tensor.ndim < 2:
        raise ValueError(
            f"orthogonal_ needs 2 or more axes, got shape {tuple(tensor.shape)}; "
            "give biases a constant instead."
        )
    drawn = tensor.new_empty(tensor.shape[0], math.prod(tensor.shape[1:])).normal_()
    wide = drawn.shape[0] < drawn.shape[1]
    q, r = torch.linalg.qr(drawn.t() if wide else drawn)
    q = q * r.diagonal().sign()
    with torch.no_grad():
        return tensor.copy_((q.t() if wide else q).reshape(tensor.shape)).mul_(gain)


def init_layer(module: nn.Module, nonlin: str = "relu", leaky_slope: float = 0.01) -> None:
    """Initialise a linear or 2-D convolution layer for its activation, bias 0 (document 2, B-5).

    tanh, sigmoid and linear get Xavier uniform; everything else Kaiming normal with ReLU's gain,
    ``leaky_relu`` with the gain of its slope. Other modules are left alone, so it can be given to
    ``Module.apply``, which visits every submodule, children first, and returns the module; document
    1 describes ``apply`` as mapping over the elements of a tensor. Bare parameters are not reached:
    the ``in_proj_weight`` of ``nn.MultiheadAttention`` keeps its own initialisation.

    Args:
        module: Any module.
        nonlin: The activation behind the layer.
        leaky_slope: Slope of ``leaky_relu``.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    if nonlin in _XAVIER:
        xavier_uniform_(module.weight)
    elif nonlin == "leaky_relu":
        kaiming_normal_(module.weight, a=leaky_slope, nonlinearity="leaky_relu")
    else:
        kaiming_normal_(module.weight, nonlinearity="relu")
    if module.bias is not None:
        zeros_(module.bias)
