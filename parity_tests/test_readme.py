"""README's code and commands are what they say."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import blocks, interop, models, recipes
from flaxstab.surgery import _residual
from parity_tests.support.pages import pasted
from parity_tests.support.torch_bits import assert_same_bits, same_processor
from torch_ref.blocks import BasicBlock

README = Path(__file__).parents[1] / "README.md"
if not README.is_file():
    pytest.skip("README.md is not part of the wheel", allow_module_level=True)


def block(marker: str) -> str:
    """Returns the fenced block behind a marker."""
    (found,) = re.findall(rf"{re.escape(marker)}\n```\w*\n(.*?)```", README.read_text(), re.DOTALL)
    return found.strip()


def test_the_example_works_when_pasted() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    assert int(names["model"].norm.count[...]) == 1


def test_the_blocks_and_models_can_be_built_when_pasted() -> None:
    """Of shapes alone."""
    (code,) = (
        code
        for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        if "models.resnet50" in code
    )
    names = {"nnx": nnx, "blocks": blocks, "models": models, "recipes": recipes}

    def run(x: jax.Array, padding: jax.Array) -> dict[str, object]:
        exec(code, names, found := {"x": x, "padding": padding})  # noqa: S102
        return {name: found[name] for name in ("y", "net", "lm")}

    made = nnx.eval_shape(run, jnp.ones((2, 5, 64)), jnp.zeros((2, 5), bool))
    assert made["y"].shape == (2, 5, 64)
    assert made["net"].fc.out_features == 10
    assert made["lm"].blocks[0].length == 12


@pytest.mark.parametrize("marker", ["<!-- main job -->", "<!-- tests -->"])
def test_each_command_is_one_line_and_installs_the_tested_set(marker: str) -> None:
    command = block(marker)
    assert "\n" not in command
    assert "-c constraints.txt" in command


def test_the_commands_run_files_that_exist() -> None:
    script = block("<!-- main job -->").split()[-1]
    assert (README.parent / script).is_file()
    assert (README.parent / "constraints.txt").is_file()


@same_processor
def test_the_page_on_seeds_runs_when_pasted() -> None:
    page = (README.parent / "docs" / "seeds.md").read_text()
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)  # noqa: S102
    nn = torch.nn
    torch.manual_seed(42)
    nn.Conv2d(3, 16, 3)
    assert_same_bits(np.asarray(names["model"].head.kernel[...]).T, nn.Linear(16, 10).weight)
    torch.manual_seed(0)
    conv, _ = nn.Conv2d(3, 16, 3), nn.Linear(16, 10)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    found = interop.state_dict(names["net"])
    assert_same_bits(found["conv.weight"], conv.weight)
    torch.manual_seed(0)
    theirs = BasicBlock(16, 32, stride=2)
    assert_same_bits(interop.state_dict(names["block"])["conv2.weight"], theirs.conv2.weight)
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    nn.init.normal_(attention.out_proj.weight, std=0.02)
    found = interop.state_dict(names["attention"])
    assert_same_bits(found["in_proj_weight"], attention.in_proj_weight)
    assert_same_bits(found["out_proj.weight"], attention.out_proj.weight)
    torch.manual_seed(0)
    table = nn.init.trunc_normal_(torch.empty(1, 16, 8), std=0.02)
    assert_same_bits(np.asarray(names["positions"].table[...]), table)


def test_the_page_on_surgery_runs_when_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_residual, "_RESIDUAL", dict(_residual._RESIDUAL))  # the page registers two
    page = (README.parent / "docs" / "surgery.md").read_text()
    names = pasted(page)
    assert len({kernel.tobytes() for kernel in np.asarray(names["layers"].kernel[...])}) == 3
    assert not names["layers"].bias[...].any()
    assert "its norm stands behind the addition" in names["refused"]
    nan = np.isnan(np.asarray(names["rows"])).all(-1)
    assert nan.tolist() == [False, False, True]
    assert names["logits"].shape == (3, 10)
