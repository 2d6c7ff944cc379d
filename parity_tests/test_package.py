"""What can be said of the package as a whole: imports, public names, sources."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import flaxstab

ROOT = Path(__file__).parents[1]
PACKAGES = ("flaxstab", "torch_ref", "parity_tests")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MAX_LINES = 400  # DESIGN, "Layout"; STYLE, "Budgets"

BLOCK_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, NoTorch())
"""

# DESIGN, "Public names": parameters in order, with the defaults that DESIGN gives.
SIGNATURES = {
    "initializers.constant": "value",
    "initializers.uniform": "a=0.0, b=1.0",
    "initializers.normal": "mean=0.0, std=1.0",
    "initializers.xavier_uniform": "gain=1.0",
    "initializers.xavier_normal": "gain=1.0",
    "initializers.kaiming_uniform": "a=0.0, mode='fan_in', nonlinearity='leaky_relu'",
    "initializers.kaiming_normal": "a=0.0, mode='fan_in', nonlinearity='leaky_relu'",
    "initializers.calculate_gain": "nonlinearity, param=None",
    "initializers.fan_in_and_fan_out": "shape",
    "initializers.eye": "",
    "initializers.dirac": "groups=1",
    "initializers.trunc_normal": "mean=0.0, std=1.0, a=-2.0, b=2.0",
    "initializers.sparse": "sparsity, std=0.01",
    "initializers.orthogonal": "gain=1.0",
    "initializers.torch_weight": "",
    "initializers.torch_bias": "fan_in",
    "norms.BatchNorm": (
        "num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True"
    ),
    "norms.GhostBatchNorm": "num_features, virtual_batch_size",
    "norms.FrozenBatchNorm": "num_features, eps=1e-05",
    "norms.RMSNorm": "normalized_shape, eps=None, elementwise_affine=True",
    "norms.LayerNorm": "normalized_shape, eps=1e-05, elementwise_affine=True, bias=True",
    "norms.GroupNorm": "num_groups, num_channels, eps=1e-05, affine=True",
    "norms.InstanceNorm": (
        "num_features, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False"
    ),
    "dropout.Dropout": "p=0.5",
    "linear.Linear": "in_features, out_features, bias=True",
    "linear.Conv": (
        "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, "
        "bias=True, padding_mode='zeros'"
    ),
    "linear.ConvTranspose": (
        "in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1, "
        "bias=True, dilation=1"
    ),
    "linear.Embed": "num_embeddings, embedding_dim, padding_idx=None",
    "dropout.ChannelDropout": "p=0.5",
    "dropout.AlphaDropout": "p=0.5",
    "dropout.DropPath": "p",
    "dropout.RecurrentDropout": "p",
    "dropout.RecurrentDropoutCell": "cell, p",
    "blocks.BasicBlock": "in_ch, out_ch, stride=1",
    "blocks.PreActResBlock": "in_ch, out_ch, groups=32, stride=1, drop=0.0",
    "surgery.init_weights": "model, rule, *rngs",
    "surgery.init_layer": "module, nonlin='relu', leaky_slope=0.01, *rngs",
    "surgery.zero_last_gamma": "model",
    "surgery.replace_norms": "model, make",
    "surgery.batch_to_group": "num_groups=32",
    "surgery.batch_to_layer": "",
    "surgery.freeze_batch_norm": "model",
    "surgery.unfreeze_batch_norm": "model, momentum=0.1",
    "surgery.convert_sync_batch_norm": "model, axis_name",
    "torch_rng.Generator": "seed",
    "torch_rng.seed_parameters": "model, seed, *then=None",
    "optim.adamw": (
        "learning_rate=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, "
        "maximize=False, *mask=None"
    ),
    "optim.decay_mask": "model",
    "optim.clip_grad_norm": "max_norm, norm_type=2.0, error_if_nonfinite=False",
    "optim.skip_nonfinite": "inner",
    "optim.warmup_cosine": "peak, warmup_steps, total_steps, end=0.0",
    "optim.cosine_annealing": "base, T_max, eta_min=0.0",
    "optim.linear_warmup": "base, warmup_steps, start_factor",
    "optim.step": "base, step_size, gamma=0.1",
    "optim.one_cycle": (
        "max_lr, total_steps, pct_start=0.3, div_factor=25.0, final_div_factor=10000.0"
    ),
    "optim.document_schedule": "base, warmup, steps_per_epoch, epochs",
    "functional.cross_entropy": (
        "logits, labels, *weight=None, *ignore_index=-100, *label_smoothing=0.0, "
        "*reduction='mean'"
    ),
    "functional.l1_penalty": "*params, *mask=None",
    "functional.l2_penalty": "*params, *mask=None",
    "training.early_stopping": "patience, min_delta=0.0, mode='min'",
    "interop.load_state_dict": "model, state_dict, *strict=True, *rename=None, *flattened=None",
    "interop.state_dict": "model, *flattened=None",
    "interop.register": "module_type, *to_torch, *to_flax",
    "interop.from_torch": "module, *rngs=None, *layout=None",
    "interop.register_twin": "torch_type, build, *rename=None",
    "models.SmallCNN": "act='relu'",
    "models.StableCNN": "norm='batch', act='relu'",
    "parity.verify": "flax_model, torch_model, *inputs, *layout=None",
    "parity.compare": "flax_side, torch_side, *inputs, *layout=None",
}  # fmt: skip
NAMES = {
    "initializers": ("zeros", "ones"),
    "functional": ("l1_penalty", "l2_penalty", "gelu", "max_pool", "avg_pool", "adaptive_avg_pool"),
    "models": ("ToyDeep", "CNN_BN", "CNN_LN"),
    "interop": ("LoadReport",),
    "parity": ("Report", "Finding", "Verdict"),
}
COMMON = ("dtype", "param_dtype", "rngs")  # of every layer, keyword-only


def run(code: str) -> str:
    """Runs code in a fresh interpreter and returns what it prints."""
    arguments = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout  # noqa: S603


def modules() -> list[str]:
    found = pkgutil.walk_packages(flaxstab.__path__, "flaxstab.")
    return [module.name for module in found]


def test_importing_flaxstab_loads_neither_jax_nor_torch() -> None:
    loaded = run("import sys, flaxstab; print(*sys.modules)").split()
    heavy = {"jax", "jaxlib", "flax", "optax", "torch", "numpy"}
    assert "flaxstab" in loaded
    assert heavy.isdisjoint(loaded)


def test_everything_but_the_harness_imports_without_torch() -> None:
    names = [name for name in modules() if not name.startswith("flaxstab.parity")]
    assert {"flaxstab.norms", "flaxstab.optim", "flaxstab.interop", "flaxstab.models"} <= set(names)
    code = f"{BLOCK_TORCH}\nimport importlib\nfor name in {names}: importlib.import_module(name)"
    assert run(code + "\nprint('torch' in sys.modules)") == "False\n"


def test_the_harness_imports_torch_only_when_it_is_used() -> None:
    assert run("import sys, flaxstab.parity; print('torch' in sys.modules)") == "False\n"


def test_the_block_of_torch_blocks() -> None:
    code = f"{BLOCK_TORCH}\ntry:\n    import torch\nexcept ImportError as e:\n    print(e)"
    assert run(code) == "torch is blocked\n"


def signature(path: str) -> dict[str, str]:
    module, name = path.split(".")
    found = getattr(importlib.import_module(f"flaxstab.{module}"), name)
    parameters = inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters
    written = {}
    for parameter in (p for p in parameters.values() if p.name != "self"):
        star = "*" if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL) else ""
        empty = parameter.default is parameter.empty
        default = "" if empty else f"={parameter.default!r}"
        written[parameter.name] = f"{star}{parameter.name}{default}"
    return written


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_public_name_has_designs_signature(path: str) -> None:
    written = signature(path)
    wanted = SIGNATURES[path].replace(", 0.999", "; 0.999").split(", ")
    wanted = [part.replace(";", ",") for part in wanted if part]
    positional = [part for part in written.values() if not part.startswith("*")]
    expected = [part for part in wanted if not part.startswith("*")]
    assert positional[: len(expected)] == expected
    for keyword in (part for part in wanted if part.startswith("*")):
        assert keyword in written.values()


@pytest.mark.parametrize(
    "path", [p for p in SIGNATURES if p.split(".")[0] in ("norms", "linear", "dropout")]
)
def test_a_layer_takes_dtype_param_dtype_and_rngs_by_keyword(path: str) -> None:
    written = signature(path)
    assert all(written[name].startswith(f"*{name}=") for name in COMMON)
    assert written["dtype"] == "*dtype=None"


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_a_public_name_is_where_design_says(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(f"flaxstab.{module}"), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_over_budget(package: str) -> None:
    sizes = {
        path.name: len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py")
    }
    assert sizes
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def torch_imports(source: str) -> int:
    count = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            count += sum(alias.name.split(".")[0] in ("torch", "torch_ref") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            count += (node.module or "").split(".")[0] in ("torch", "torch_ref")
    return count


def test_only_the_harness_and_the_torch_sides_of_interop_and_environment_import_torch() -> None:
    sides = ("interop/_torch", "_environment/_devices.py")
    for path in (ROOT / "flaxstab").rglob("*.py"):
        inside = path.relative_to(ROOT / "flaxstab")
        if inside.parts[0] != "parity" and not inside.as_posix().startswith(sides):
            assert torch_imports(path.read_text()) == 0, inside


@pytest.mark.parametrize(
    "planted", ["import torch", "from torch import nn", "def f():\n    import torch.nn"]
)
def test_a_planted_import_of_torch_is_found(planted: str) -> None:
    assert torch_imports(planted) == 1
    assert torch_imports("import torchvision_like\nfrom jax import numpy") == 0
