"""A checkpoint holds the whole state of any model and optimizer, bit for bit, or is refused."""

import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

from _checkpoint import CheckpointError, Checkpoints, first_difference

from flaxstab import dropout, linear, norms

GRAPH, TREE = True, False


class Net(nnx.Module):
    def __init__(self, seed: int, width: int = 4, dtype: str = "float32") -> None:
        rngs = nnx.Rngs(seed)
        self.layer = linear.Linear(3, width, param_dtype=dtype, rngs=rngs)
        self.norm = norms.BatchNorm(width, param_dtype=dtype)
        self.drop = dropout.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.layer(x)))


def built(seed: int, **options: object) -> tuple[nnx.Module, nnx.Optimizer]:
    model = Net(seed, **options)
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@partial(jax.jit, static_argnums=0)
def step(graph: nnx.GraphDef, state: nnx.State) -> tuple[nnx.State, jax.Array]:
    model, optimizer = nnx.merge(graph, state)
    said = model(jnp.arange(6.0).reshape(2, 3))
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    return nnx.state((model, optimizer)), said


def trained(both: tuple[nnx.Module, nnx.Optimizer], count: int) -> list[bytes]:
    """Takes steps; returns what the model says in training, and all state behind, as bytes."""
    graph, state = nnx.split(both)
    said = []
    for _ in range(count):
        state, y = step(graph, state)
        said.append(y)
    nnx.update(both, state)
    leaves = [*said, *jax.tree.leaves(state)]
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    plain = [jax.random.key_data(a) if key else a for a, key in zip(leaves, is_key, strict=True)]
    return [np.asarray(leaf).tobytes() for leaf in plain]


@pytest.mark.parametrize(("before", "behind"), [(GRAPH, TREE), (TREE, GRAPH), (TREE, TREE)])
def test_model_and_optimizer_go_on_where_they_were_in_either_mode_of_nnx(
    before: bool, behind: bool, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    with nnx.set_graph_mode(before), nnx.set_graph_updates(before):
        first = built(0)
        trained(first, 3)
        checkpoints.save(3, nnx.state(first), {"note": "é"})
        expected = trained(first, 2)
    with nnx.set_graph_mode(behind), nnx.set_graph_updates(behind):
        second = built(1)
        nnx.update(second, checkpoints.restore(3, nnx.state(second)))
        assert trained(second, 2) == expected
    assert checkpoints.about(3) == {"note": "é"}


def test_the_test_above_would_notice_what_is_left_out(tmp_path: Path) -> None:
    checkpoints, first = Checkpoints(tmp_path), built(0)
    trained(first, 3)
    checkpoints.save(3, nnx.state(first), {})
    expected = trained(first, 2)
    for kind in (nnx.RngCount, nnx.RngKey, nnx.Param, nnx.BatchStat, nnx.optimizer.OptState):
        second = built(1)
        restored = checkpoints.restore(3, nnx.state(second))
        lost = nnx.filter_state(nnx.state(second), kind)
        assert jax.tree.leaves(lost)
        nnx.update(second, nnx.merge_state(restored, lost))
        assert trained(second, 2) != expected, kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 5}, "checkpoint 1 is of another model: 0.layer.bias is 'float32[4]' in the"
                       " checkpoint and 'float32[5]' here"),
        ({"dtype": "bfloat16"}, "0.layer.bias is 'float32[4]' in the checkpoint and 'bfloat16[4]'"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_the_first_array_that_differs(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, nnx.state(built(0)), {})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoints.restore(1, nnx.state(built(0, **options)))


def test_what_one_side_lacks_is_named() -> None:
    assert first_difference({"a": 1}, {"a": 1}) == ""
    assert first_difference({"a": 1}, {}) == "a is 1 in the checkpoint and missing here"
    assert first_difference({}, {"a": 1}) == "a is missing in the checkpoint and 1 here"
    assert first_difference({"a": 1}, {"a": True}) == "a is 1 in the checkpoint and True here"


def test_old_and_unfinished_checkpoints_go_and_other_files_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for name in ("7", "9.orbax-checkpoint-tmp", "notes", "5 old"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="there is no finished checkpoint in"):
        checkpoints.latest()
    for n in (7, 10, 30, 200):
        checkpoints.save(n, {"x": jnp.full(2, n)}, {})
    assert checkpoints.latest() == 200
    kept = {"30", "30.json", "200", "200.json", "notes", "5 old"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    (tmp_path / "200.orbax-checkpoint-tmp").mkdir()
    checkpoints.save(200, {"x": jnp.zeros(2, int)}, {})
    checkpoints.save(30_000, {"x": jnp.zeros(2, int)}, {})
    assert {path.stem for path in tmp_path.glob("*0*")} == {"200", "30000"}
    assert checkpoints.restore(200, {"x": jnp.zeros(2, int)})["x"].tolist() == [200, 200]
