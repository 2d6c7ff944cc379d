"""README's code and commands are what they say."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from parity_tests.support.torch_bits import assert_same_bits, same_processor

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
    torch.manual_seed(42)
    torch.nn.Conv2d(3, 16, 3)
    assert_same_bits(np.asarray(names["model"].head.kernel[...]).T, torch.nn.Linear(16, 10).weight)
