"""What no twin can be made of: hooks, ties, weights without values, dtypes that JAX rounds."""

from typing import TYPE_CHECKING

import jax

from flaxstab._typing import DTypeLike
from flaxstab.interop._torch_layers import refusal

if TYPE_CHECKING:
    import torch


def check_plain(module: "torch.nn.Module", name: str) -> None:
    """Refuses weights without values, and what changes a module's result from outside of it."""
    lazy = [n for n, p in module.named_parameters(recurse=False) if "Uninit" in type(p).__name__]
    empty = [n for n, t in module.state_dict(keep_vars=True).items() if t.device.type == "meta"]
    if lazy or empty:
        fix = "Run it once, or load its weights."
        raise ValueError(refusal(module, name, f"{(lazy + empty)[0]!r} has no values yet", fix))
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    fix = "Remove it: a twin would compute without it."
    for found, what in (
        (any(own.get(hook) for hook in hooks), "it has a hook"),
        ("parametrizations" in dict(module.named_children()), "it is parametrized"),
        ("forward" in own, "its forward was replaced"),
    ):
        if found:
            raise ValueError(refusal(module, name, what, fix))


def check_ties(module: "torch.nn.Module") -> None:
    """Refuses a parameter that two modules share."""
    owners: dict[int, tuple[int, str]] = {}
    for name, owner in module.named_modules():
        for own, parameter in owner.named_parameters(recurse=False):
            full = ".".join(filter(None, (name, own)))
            first = owners.setdefault(id(parameter), (id(owner), full))
            if first[0] != id(owner):
                rule = f"{first[1]!r} and {full!r} are one tensor"
                fix = "Untie them, or teach the whole by register_twin (linear.Embed.attend)."
                raise ValueError(refusal(owner, name, rule, fix))


def check_dtype(module: object, name: str, dtype: DTypeLike) -> None:
    """Refuses a dtype that JAX would round to another."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        fix = "Set jax_enable_x64, or call module.float()."
        raise ValueError(refusal(module, name, f"JAX holds no {dtype} as it is set", fix))
