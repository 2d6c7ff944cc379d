"""Where stock NNX layers are not the PyTorch layers that a state_dict came from."""

from collections.abc import Callable, Iterable

from flax import nnx

from flaxstab.interop._report import LoadReport, LoadWarning, Outcome
from flaxstab.interop._walk import Walked

_UNTOLD = "and a state_dict does not tell"


def stock_warnings(found: Iterable[Walked], report: LoadReport) -> tuple[LoadWarning, ...]:
    """Returns what differs in the layers that got a tensor, each difference with all its layers.

    A setting that a user gave is taken for a choice, unless PyTorch has no layer like it: only
    NNX's defaults are named.

    Args:
      found: the model's layers.
      report: what was loaded.
    """
    loaded = {e.name for e in report.entries if e.outcome == Outcome.LOADED}
    named: dict[str, list[str]] = {}
    for walked in found:
        layer = walked.layer
        names = {layer.prefix + tensor for entry in layer.entries for tensor in entry.tensors}
        if names & loaded:
            for text in _differences(walked):
                named.setdefault(text, []).append(layer.prefix.removesuffix("."))
    return tuple(LoadWarning(tuple(modules), text) for text, modules in named.items())


def _differences(walked: Walked) -> list[str]:
    difference = STOCK.get(type(walked.module))
    texts = [] if difference is None else difference(walked.module)
    return [*texts, _UNNAMED] if walked.unnamed else texts


_UNNAMED = (
    "nnx.vmap stacked a module whose type interop does not know, so each layer in it counts for "
    "itself. Call flaxstab.interop.register_stacked for the type."
)


def _batch_norm(module: nnx.BatchNorm) -> list[str]:
    texts = [
        "nnx.BatchNorm puts the biased variance into its running variance, PyTorch the unbiased "
        "one. Use flaxstab.norms.BatchNorm to train."
    ]
    weights = {0.99: "NNX's default; PyTorch's 0.1 is 0.9", 0.1: "PyTorch's 0.1 is 0.9"}
    if module.momentum in weights:
        texts.append(
            f"nnx.BatchNorm's momentum={module.momentum} weighs the old statistics, PyTorch's "
            f"momentum the new ones ({weights[module.momentum]} here), {_UNTOLD}. "
            "Pass momentum=0.9 or use flaxstab.norms.BatchNorm."
        )
    return texts


def _eps(kind: str, ours: str, torch: str, argument: str) -> Callable[..., list[str]]:
    def differences(module: nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm) -> list[str]:
        if module.epsilon != 1e-6:
            return []
        return [
            f"nnx.{kind}'s epsilon is 1e-06, NNX's default; PyTorch's default is {torch}, "
            f"{_UNTOLD}. Pass epsilon={argument} or use flaxstab.norms.{ours}."
        ]

    return differences


def _conv(module: nnx.Conv) -> list[str]:
    strides = module.strides
    largest = 1 if strides is None else max(strides) if isinstance(strides, tuple) else strides
    if module.padding != "SAME" or largest == 1:
        return []
    return [
        "nnx.Conv's padding='SAME' with strides pads more at the end, as no convolution of "
        "PyTorch's does. Pass padding=((p, p), ...) or use flaxstab.linear.Conv."
    ]


STOCK: dict[type[nnx.Module], Callable[..., list[str]]] = {
    nnx.BatchNorm: _batch_norm,
    nnx.LayerNorm: _eps("LayerNorm", "LayerNorm", "1e-05", "1e-5"),
    nnx.GroupNorm: _eps("GroupNorm", "GroupNorm", "1e-05", "1e-5"),
    nnx.InstanceNorm: _eps("InstanceNorm", "InstanceNorm", "1e-05", "1e-5"),
    nnx.RMSNorm: _eps("RMSNorm", "RMSNorm", "the dtype's own, 1.2e-07 in float32", "eps"),
    nnx.Conv: _conv,
}
