"""What a load's report finds: odd numbers, near names, what stock layers do otherwise; as data."""

import json
from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from flaxstab import attention, interop, linear, norms
from flaxstab.interop import _rules
from flaxstab.interop._nearest import nearest
from parity_tests.test_interop import Own, Two, state_of, torch_two
from parity_tests.test_interop_rules import shuffled

R = nnx.Rngs(0)
T = torch.nn


def _loaded(change: dict[str, object], make: Callable[[], nnx.Module] = Two) -> interop.LoadReport:
    tensors = torch_two() if make is Two else interop.state_dict(make())
    return interop.load_state_dict(make(), {**tensors, **change}, strict=False)


def _with(array: np.ndarray, place: int, value: float) -> np.ndarray:
    changed = np.array(array)
    changed.flat[place] = value
    return changed


ONES = np.ones((4, 3), "float32")


@pytest.mark.parametrize(
    ("name", "tensor", "what"),
    [
        ("first.weight", 0 * ONES, "all zero"),
        ("first.weight", 0.5 * ONES, "constant 0.5"),
        ("first.weight", _with(ONES, 11, np.nan), "1 NaN"),
        ("first.weight", _with(_with(ONES, 0, -np.inf), 1, np.inf), "2 infinite"),
        ("first.weight", _with(_with(ONES, 0, np.nan), 1, np.inf), "1 NaN and 1 infinite"),
        ("first.weight", torch.full((4, 3), torch.nan, dtype=torch.bfloat16), "12 NaN"),
        ("first.weight", np.full((4, 3), np.inf, ml_dtypes.bfloat16), "12 infinite"),
        ("first.weight", np.zeros((9, 9)), "all zero"),  # of the wrong shape
        ("first.bias", np.full(4, np.nan), "4 NaN"),
        ("last.running_var", np.array([1.0, -0.5, 1, 1]), "negative: -0.5"),
        ("last.running_var", np.zeros(4), "all zero"),
        ("last.running_mean", np.full(4, np.inf), "4 infinite"),
        ("extra", np.full(4, np.nan), "4 NaN"),  # of no layer
    ],
)
def test_odd_numbers_are_named(name: str, tensor: object, what: str) -> None:
    report = _loaded({name: tensor})
    assert report.suspicious == (f"{name} {what}",)
    assert f"1 suspicious: {name} {what}" in str(report)
    assert next(e for e in report.entries if e.name == name).suspicion == what


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("first.weight", _with(ONES, 11, 2.0)),
        ("first.weight", _with(0 * ONES, 11, 1e-30)),
        ("first.weight", (1e38 * np.arange(12)).reshape(4, 3) / 4),
        ("first.weight", np.asarray(3e38 * ONES * [1, 0.5, 1], "float32")),  # the sum overflows
        ("first.bias", np.zeros(4)),
        ("first.bias", np.ones(4)),
        ("last.weight", np.zeros(4)),  # the last gamma of a residual branch
        ("last.weight", np.ones(4)),
        ("last.running_mean", np.zeros(4)),
        ("last.running_var", np.ones(4)),
        ("last.num_batches_tracked", np.asarray(0)),
        ("extra", np.zeros(4)),
    ],
)
def test_fresh_and_zeroed_tensors_are_not_odd(name: str, tensor: np.ndarray) -> None:
    assert _loaded({name: tensor}).suspicious == ()


def test_a_fresh_model_has_no_odd_numbers() -> None:
    fresh = T.ModuleList(
        [
            T.Linear(3, 4), T.Conv2d(2, 3, 1), T.MultiheadAttention(4, 2), T.LSTMCell(2, 3),
            T.BatchNorm2d(3), T.LayerNorm(4), T.GroupNorm(1, 3), T.Linear(1, 1), T.PReLU(),
        ]
    )  # fmt: skip
    ours = nnx.List(
        [
            linear.Linear(3, 4, rngs=R), linear.Conv(2, 3, 1, rngs=R),
            attention.MultiHeadAttention(4, 2, rngs=R), nnx.LSTMCell(2, 3, rngs=R),
            norms.BatchNorm(3), norms.LayerNorm(4), norms.GroupNorm(1, 3),
            linear.Linear(1, 1, rngs=R), nnx.PReLU(),
        ]
    )  # fmt: skip
    report = interop.load_state_dict(ours, fresh.state_dict())
    assert report.complete
    assert report.suspicious == ()
    assert report.warnings == ()


def test_packed_weights_that_are_zero_are_odd() -> None:
    report = _loaded(
        {"in_proj_weight": np.zeros((12, 4), "f"), "in_proj_bias": np.zeros(12, "f")},
        lambda: attention.MultiHeadAttention(4, 2, rngs=R),
    )
    assert report.suspicious == ("in_proj_weight all zero",)


def test_a_missing_tensor_has_its_nearest_by_shape_then_by_name() -> None:
    tensors = torch_two()
    changed = {f"net.{name}": tensor for name, tensor in tensors.items() if "running" not in name}
    report = interop.load_state_dict(Two(), changed, strict=False)
    found = {e.name: e.nearest for e in report.entries}
    assert found["first.weight"] == ("net.first.weight",)
    assert found["last.bias"][0] == "net.last.bias"
    assert found["net.last.weight"][0] == "last.weight"
    assert found["last.running_mean"][0] in {"net.last.bias", "net.last.weight"}  # the shape's
    assert len(found["last.running_mean"]) == 3
    assert "first.weight (perhaps net.first.weight)" in str(report)


def test_names_without_likeness_have_no_nearest() -> None:
    assert nearest({"a.weight": (2,)}, {"b.gain": (3,), "a.b.weight": (4,)}) == {"a.weight": ()}
    assert nearest({"x.a.weight": (2,)}, {"y.a.weight": (3,)}) == {"x.a.weight": ("y.a.weight",)}


def test_a_loaded_tensor_has_no_nearest() -> None:
    report = interop.load_state_dict(Two(), {**torch_two(), "extra": ONES}, strict=False)
    assert {e.name for e in report.entries if e.nearest} == set()


class Stock(nnx.Module):
    def __init__(self, **options: object) -> None:
        self.a = nnx.BatchNorm(4, rngs=R, **options)
        self.b = nnx.BatchNorm(4, rngs=R, **options)
        self.c = nnx.LayerNorm(4, rngs=R)


BIASED = "biased variance into its running variance, PyTorch the unbiased"


def warned(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Returns a load's warnings: the text with the modules."""
    tensors = interop.state_dict(model)
    return {w.text: w.modules for w in interop.load_state_dict(model, tensors).warnings}


def test_stock_layers_are_warned_of_once_for_each_difference() -> None:
    model = Stock()
    found = warned(model)
    assert list(found.values()) == [("a", "b"), ("a", "b"), ("c",)]
    texts = [*found]
    assert BIASED in texts[0]
    assert "Use flaxstab.norms.BatchNorm to train." in texts[0]
    assert "momentum=0.99 weighs the old statistics" in texts[1]
    assert "epsilon is 1e-06, NNX's default; PyTorch's default is 1e-05" in texts[2]
    assert "flaxstab.norms.LayerNorm" in texts[2]
    report = interop.load_state_dict(model, interop.state_dict(model))
    assert "\n  warning: a, b: nnx.BatchNorm puts the biased" in str(report)
    assert report.complete


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: nnx.BatchNorm(4, momentum=0.9, rngs=R), [BIASED]),
        (lambda: nnx.BatchNorm(4, momentum=0.1, rngs=R), [BIASED, "momentum=0.1 weighs the old"]),
        (lambda: nnx.GroupNorm(4, 2, rngs=R), ["nnx.GroupNorm's epsilon is 1e-06"]),
        (lambda: nnx.InstanceNorm(4, rngs=R), ["nnx.InstanceNorm's epsilon is 1e-06"]),
        (lambda: nnx.RMSNorm(4, rngs=R), ["PyTorch's default is the dtype's own, 1.2e-07"]),
        (lambda: nnx.LayerNorm(4, epsilon=1e-5, rngs=R), []),
        (lambda: nnx.LayerNorm(4, epsilon=1e-12, rngs=R), []),
        (lambda: nnx.Conv(2, 3, (3, 3), strides=2, rngs=R), ["padding='SAME' with strides"]),
        (lambda: nnx.Conv(2, 3, (3, 3), strides=(1, 2), rngs=R), ["padding='SAME' with strides"]),
        (lambda: nnx.Conv(2, 3, (3, 3), rngs=R), []),
        (lambda: nnx.Conv(2, 3, (3, 3), strides=2, padding=1, rngs=R), []),
        (lambda: nnx.Linear(2, 3, rngs=R), []),
        (lambda: norms.BatchNorm(4), []),
    ],
)
def test_a_stock_layer_is_warned_of_where_torch_differs(
    make: Callable[[], nnx.Module], parts: list[str]
) -> None:
    texts = [*warned(make())]
    assert len(texts) == len(parts)
    for text, part in zip(texts, parts, strict=True):
        assert part in text


def test_a_stock_layer_that_got_nothing_is_not_warned_of() -> None:
    report = interop.load_state_dict(Stock(), {"c.bias": np.ones(4)}, strict=False)
    assert [w.modules for w in report.warnings] == [("c",)]


def test_the_table_has_a_line_for_each_tensor() -> None:
    tensors = {f"m.{n}": t for n, t in torch_two().items() if n != "last.bias"}
    tensors["m.first.weight"] = np.zeros((4, 3), "float32")
    tensors["m.extra"] = np.ones(4)
    report = interop.load_state_dict(
        Two(), tensors, strict=False, rename=lambda name: name.removeprefix("m.")
    )
    head, rule, *lines = report.table().split("\n")
    assert head.split() == [
        "outcome", "tensor", "shape", "dtype", "variable", "shape", "dtype", "how", "note"
    ]  # fmt: skip
    assert set(rule) == {"-", " "}
    assert len(lines) == len(report.entries) == 8
    weight = next(line for line in lines if "first.weight" in line)
    assert weight.split("  ")[0] == "loaded"
    for part in ("m.first.weight = first.weight", "(4, 3)", "(3, 4)", "first.kernel", "all zero"):
        assert part in weight
    starts = {line.index("m.") for line in lines if "m." in line}
    assert len(starts) == 1  # in columns
    missing = next(line for line in lines if line.startswith("missing"))
    assert missing.endswith("perhaps extra")


def test_the_report_is_data() -> None:
    tensors = {**interop.state_dict(Stock()), "extra": np.ones(4)}
    del tensors["a.bias"]
    report = interop.load_state_dict(Stock(), tensors, strict=False)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["complete"] is False
    assert data["counts"] == {
        "loaded": 9, "missing": 1, "unexpected": 1, "mismatched": 0, "ignored": 0, "kept": 0
    }  # fmt: skip
    assert len(data["entries"]) == 11
    entry = next(e for e in data["entries"] if e["name"] == "a.bias")
    assert entry["outcome"] == "missing"
    assert entry["nearest"] == ["extra"]
    assert entry["variable_shapes"] == [[4]]
    assert entry["source_shape"] is None
    assert data["warnings"][0]["modules"] == ["a", "b"]


def flat(model: nnx.Module) -> list[object]:
    return [np.asarray(leaf[...]).tolist() for _, leaf in nnx.to_flat_state(nnx.state(model))]


def test_a_rule_that_fails_at_the_last_tensor_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_rules, "RULES", dict(_rules.RULES))
    calls = []

    def fail_later(_: nnx.Module, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(tensors)
        if len(calls) > 1:
            raise ArithmeticError("the rule's own")
        return {"gamma": tensors["gain"]}

    interop.register(Own, to_torch=lambda m: {"gain": np.asarray(m.gamma[...])}, to_flax=fail_later)
    model = nnx.List([linear.Linear(2, 2, rngs=R), Own()])
    tensors = {f"{i}.weight": np.full((2, 2), 9.0) for i in ("0", "1.inner")}
    tensors |= {f"{i}.bias": np.full((2,), 9.0) for i in ("0", "1.inner")}
    before = flat(model)
    with pytest.raises(ArithmeticError, match="the rule's own"):
        interop.load_state_dict(model, {**tensors, "1.gain": np.ones(2)})
    assert flat(model) == before


class Buffers(nnx.Module):
    """A parameter, a statistic and a variable of no kind."""

    def __init__(self) -> None:
        self.gain = nnx.Param(jnp.ones((2,)))
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.table = nnx.Variable(jnp.zeros((2, 3)))


def test_buffers_of_a_registered_type_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rules, "RULES", dict(_rules.RULES))
    interop.register(
        Buffers,
        to_torch=lambda m: {
            "gain": np.asarray(m.gain[...]),
            "seen": np.asarray(m.seen[...]),
            "table": np.asarray(m.table[...]).T,
        },
        to_flax=lambda _, t: {"gain": t["gain"], "seen": t["seen"], "table": t["table"].T},
    )
    twin = T.Module()
    twin.gain = T.Parameter(torch.ones(2))
    twin.register_buffer("seen", torch.zeros(()))
    twin.register_buffer("table", torch.zeros(3, 2))
    tensors, model = shuffled(twin), Buffers()
    assert interop.load_state_dict(model, tensors).complete
    assert isinstance(model.seen, nnx.BatchStat)
    assert model.table[...].T.tolist() == tensors["table"].tolist()
    for name, array in interop.state_dict(model).items():
        assert array.tolist() == tensors[name].tolist()


@pytest.mark.parametrize("size", [4, 2048])
def test_a_model_shares_no_memory_with_transposed_tensors(size: int) -> None:
    layer = linear.Linear(1, size, rngs=R)
    tensors = {"weight": np.ones((size, 1), "float32"), "bias": np.ones(size, "float32")}
    interop.load_state_dict(layer, tensors)
    before = state_of(layer)
    for array in tensors.values():
        array[...] = 7
    assert state_of(layer) == before


def test_a_count_that_old_files_lack_is_kept_as_in_torch() -> None:
    theirs = torch.nn.BatchNorm2d(3)
    old = {n: t for n, t in theirs.state_dict().items() if n != "num_batches_tracked"}
    theirs.load_state_dict(old)
    ours = norms.BatchNorm(3)
    ours.count[...] = jnp.asarray(5, ours.count.dtype)
    report = interop.load_state_dict(ours, old)
    assert (report.kept, report.complete) == (("num_batches_tracked",), True)
    assert int(ours.count[...]) == 5


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "<U1", "O"])
def test_numbers_of_another_kind_are_refused(dtype: str) -> None:
    layer = linear.Linear(2, 2, rngs=nnx.Rngs(0))
    before = np.asarray(layer.kernel[...])
    given = {"weight": np.ones((2, 2)).astype(dtype), "bias": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=r"weight .* for float32"):
        interop.load_state_dict(layer, given)
    np.testing.assert_array_equal(layer.kernel[...], before)
