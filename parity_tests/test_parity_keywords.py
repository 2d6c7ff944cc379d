"""Layers that are called with keywords, in ``locate`` and ``reproduce``."""

from pathlib import Path

import jax
import pytest
from flax import nnx
from torch import Tensor, nn

from flaxstab import linear, parity
from flaxstab.parity._reproduce import _captured
from flaxstab.parity._sources import source_of
from parity_tests.support.cases import values

X = values(8, 4)


class Scaled(nnx.Module):
    """A layer whose keyword may have another name, or another default."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = linear.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array, *, scale: float = 1.0, factor: float = 1.0) -> jax.Array:
        return self.fc(x) * (scale * factor)


class Model(nnx.Module):
    def __init__(self, keyword: str = "scale") -> None:
        self.block, self.keyword = Scaled(nnx.Rngs(0)), keyword

    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = self.block(x, **{self.keyword: 0.5})
        return x


class TorchScaled(nn.Module):
    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.fc, self.power = nn.Linear(4, 4), power

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale**self.power


class TorchModel(nn.Module):
    def __init__(self, step: float, power: int = 1) -> None:
        super().__init__()
        self.block, self.step = TorchScaled(power), step

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.block(x, scale=0.5 + self.step * i)
        return x


def test_a_caller_that_passes_another_keyword_is_at_fault_not_the_layer() -> None:
    found = parity.locate(Model(), TorchModel(1.0), X)
    assert (found.first, found.direction) == ("(model)", "forward")
    (block,) = [e for e in found.layers if (e.name, e.direction) == ("block", "forward")]
    assert (block.differs, block.own < 1) == (False, True)


def test_a_layer_that_uses_its_keyword_otherwise_is_at_fault() -> None:
    assert parity.locate(Model(), TorchModel(0.0, power=2), X).first == "block"


def test_keywords_of_other_names_charge_nobody_with_what_they_may_explain() -> None:
    found = parity.locate(Model("factor"), TorchModel(1.0), X)
    (block,) = [e for e in found.layers if (e.name, e.direction) == ("block", "forward")]
    assert (block.kind, block.differs) == ("unknown", False)
    assert block.note == "the calls' keywords differ: factor, scale"
    assert found.first == "(model)"


def test_compare_tells_nothing_backward_where_its_search_stopped() -> None:
    found = parity.compare(Model(), TorchModel(1.0), X, dtypes=()).location
    assert found is not None
    assert found.first == "(model)"
    assert {e.direction for e in found.layers} == {"forward"}


def test_a_layer_called_with_keywords_is_not_captured_without_them() -> None:
    model = TorchModel(1.0)
    with pytest.raises(ValueError, match=r"without keywords, got .*scale.* Its model is shown"):
        _captured(model, model.block, (X,), None, None)


def test_a_script_shows_the_model_of_a_layer_called_with_keywords(tmp_path: Path) -> None:
    found = parity.reproduce(
        Model(), TorchModel(0.0, power=2), X, dtypes=(), path=tmp_path / "scaled.py", patience=1.0,
        flax_source=f"{__name__}.Model()", torch_source=f"{__name__}.TorchModel(0.0, power=2)",
    )  # fmt: skip
    assert (found.layer, found.quantity) == ("", "output in float64")


class Oddly(nn.Module):
    def __init__(this, width: int = 2) -> None:  # noqa: N805 - on purpose
        super().__init__()
        this.width = width


def test_a_constructors_first_parameter_is_no_argument_whatever_its_name() -> None:
    call = source_of(Oddly(3), "", "torch_source")
    assert call.text == f"{__name__}.Oddly(width=3)"
