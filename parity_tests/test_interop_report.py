"""The report of a load: every tensor, every variable, shared ones, rounded ones."""

import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import interop, linear, norms
from parity_tests.test_interop import Two, state_of, torch_two
from parity_tests.test_interop_rules import shuffled

R = nnx.Rngs(0)
T = torch.nn


class Shared(nnx.Module):
    def __init__(self) -> None:
        self.body = nnx.List([nnx.Sequential(linear.Linear(2, 2, rngs=R))])
        self.head = self.body[0]
        self.tied = linear.Linear(2, 2, rngs=R)
        self.tied.kernel = self.body[0].layers[0].kernel


def _torch_shared() -> dict[str, torch.Tensor]:
    body = T.Sequential(T.Linear(2, 2))
    twin = T.ModuleDict({"body": T.ModuleList([body]), "head": body, "tied": T.Linear(2, 2)})
    twin["tied"].weight = body[0].weight
    return {name: tensor.clone() for name, tensor in shuffled(twin).items()}


def test_a_shared_module_goes_by_any_of_its_names() -> None:
    tensors = shuffled(T.ModuleDict({"x": T.Linear(2, 2), "y": T.Linear(2, 2)}))
    both = {
        f"{n}.{p}": tensors[f"x.{p}"] for n in ("body.0.0", "head.0") for p in ("weight", "bias")
    }
    both |= {"tied.weight": tensors["x.weight"], "tied.bias": tensors["y.bias"]}
    model = Shared()
    assert list(interop.state_dict(model)) == [n for n in both if not n.startswith("head")]
    for absent in ("", "head", "body"):
        model = Shared()
        given = {n: t for n, t in both.items() if not absent or not n.startswith(absent)}
        report = interop.load_state_dict(model, given)
        assert report.complete
        assert set(report.loaded) == given.keys()
        kernel = model.head.layers[0].kernel[...]
        assert kernel.T.tolist() == tensors["x.weight"].tolist()
    report = interop.load_state_dict(model, {"tied.bias": both["tied.bias"]}, strict=False)
    assert report.missing == ("body.0.0.weight", "body.0.0.bias")


def test_different_tensors_for_one_variable_are_a_mismatch() -> None:
    model, tensors = Shared(), _torch_shared()
    before = state_of(model)
    message = (
        r"3 that fit\n  3 mismatched: tied\.weight differs from body\.0\.0\.weight \(one .*, "
        r"head\.0\.weight differs from body\.0\.0\.weight \(one variable in the model\), "
        r"head\.0\.bias differs from body\.0\.0\.bias"
    )
    with pytest.raises(ValueError, match=message):
        interop.load_state_dict(model, tensors)
    assert state_of(model) == before


class Circular(nnx.Module):
    def __init__(self) -> None:
        self.inner = linear.Linear(2, 2, rngs=R)
        self.again = nnx.List([self])


def test_a_module_that_holds_itself_is_walked_once() -> None:
    assert list(interop.state_dict(Circular())) == ["inner.weight", "inner.bias"]


def test_the_report_accounts_for_every_tensor_and_every_variable() -> None:
    model, tensors = Two(), torch_two()
    del tensors["last.bias"]
    tensors["first.bias"] = torch.ones(9)
    tensors["first.weight"] = torch.full((4, 3), 0.1, dtype=torch.float64)
    tensors["extra"] = torch.ones(1)
    given = {f"m.{name}": tensor for name, tensor in tensors.items()}
    report = interop.load_state_dict(
        model, given, strict=False, rename=lambda name: name.removeprefix("m.")
    )
    assert {e.source for e in report.entries} - {""} == given.keys()
    paths = {".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model))}
    assert {e.variable for e in report.entries} - {""} == paths
    found = {e.name: e for e in report.entries}
    weight = found["first.weight"]
    assert weight[:5] == ("m.first.weight", "first.weight", "first.kernel", (4, 3), (4, 3))
    assert weight[5:8] == ("float64", "float32", interop.Outcome.LOADED)
    assert weight.transform == "(out, in) -> (in, out)"
    assert weight.rounded
    assert found["last.bias"][:5] == ("", "last.bias", "last.bias", None, (4,))
    assert found["last.bias"].outcome == "missing"
    assert found["extra"][:5] == ("m.extra", "extra", "", (1,), None)
    assert found["extra"].outcome == "unexpected"
    assert found["first.bias"].outcome == "mismatched"
    assert found["last.num_batches_tracked"][5:7] == ("int64", "int32")
    assert report.rounded == ("first.weight",)
    assert "1 rounded: first.weight" in str(report)


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.5, False), (0.1, True), (1e300, True), (np.nan, False)]
)
def test_a_number_that_the_variable_cannot_hold_is_rounded(value: float, rounded: bool) -> None:
    model = norms.BatchNorm(2)
    tensors = {**interop.state_dict(model), "running_mean": np.full((2,), value)}
    report = interop.load_state_dict(model, tensors)
    assert report.rounded == (("running_mean",) if rounded else ())
    tensors["num_batches_tracked"] = np.asarray(2**40)
    assert "num_batches_tracked" in interop.load_state_dict(model, tensors).rounded


def test_half_of_a_pair_is_of_no_use() -> None:
    model = nnx.OptimizedLSTMCell(2, 2, rngs=R)
    tensors = shuffled(T.LSTMCell(2, 2))
    del tensors["bias_hh"]
    report = interop.load_state_dict(model, tensors, strict=False)
    assert report.missing == ("bias_hh",)
    assert report.mismatched == ("bias_ih is of no use without bias_ih and bias_hh",)
    assert not model.dense_h.bias[...].any()


def test_a_long_report_is_short() -> None:
    model = nnx.List([linear.Linear(2, 2, rngs=R) for _ in range(50)])
    assert str(interop.load_state_dict(model, interop.state_dict(model))) == "100 tensors loaded"
    tensors = {f"{name}x": array for name, array in interop.state_dict(model).items()}
    tensors |= {f"{n}.weight": np.ones((3, 3)) for n in range(50)}
    with pytest.raises(ValueError, match="Nothing was loaded") as caught:
        interop.load_state_dict(model, tensors)
    assert str(caught.value).split("\n") == [
        "every tensor must fit the model, got 0 that fit",
        "  50 missing: 0.bias (perhaps 0.biasx), 1.bias (perhaps 1.biasx), 2.bias (perhaps "
        "2.biasx) and 47 more",
        "  100 unexpected: 0.weightx (perhaps 0.weight), 0.biasx (perhaps 0.bias), 1.weightx "
        "(perhaps 1.weight) and 97 more",
        "  50 mismatched: 0.weight (3, 3) for (2, 2) (perhaps 0.weightx), 1.weight (3, 3) for "
        "(2, 2) (perhaps 1.weightx), 2.weight (3, 3) for (2, 2) (perhaps 2.weightx) and 47 more",
        "  50 suspicious: 0.weight constant 1, 1.weight constant 1, 2.weight constant 1 and 47 "
        "more",
        "Nothing was loaded. Pass rename= for other names, or strict=False to load what fits.",
    ]


def test_two_tensors_of_one_name_are_refused() -> None:
    inner = nnx.Dict(c=linear.Linear(2, 2, False, rngs=R))
    model = nnx.Dict({"a.b": inner, "a": nnx.Dict({"b": nnx.Dict({**inner})})})
    model["a"]["b"]["c"] = linear.Linear(2, 2, False, rngs=R)
    for read in (interop.state_dict, lambda model: interop.load_state_dict(model, {})):
        with pytest.raises(ValueError, match=r"name of its own, got 'a\.b\.c\.weight' twice"):
            read(model)
