"""What is known to go wrong: pairs of jax and flax that cannot be imported, and past upgrades.

Data only. Each pair was tried (the two wheels, ``from flax import nnx``, one jitted layer); ranges
end where the neighbouring releases were tried, too. An incident marked "checked" was looked up in
the releases themselves; the others rest on their reference.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from flaxstab._environment._versions import key, order, within

Kind = Literal["API", "numeric", "stream", "import", "crash", "checkpoint"]


class BadPair(NamedTuple):
    """Versions of jax and flax of which ``flax.nnx`` cannot be imported.

    Attributes:
      jax: range of jax.
      flax: range of flax.
      fails: the end of the error that importing ``flax.nnx`` raises.
      install: what to install instead.
      reference: where users report it, '' if nowhere.
    """

    jax: str
    flax: str
    fails: str
    install: str
    reference: str


class Incident(NamedTuple):
    """A release that broke users or changed what they compute.

    Attributes:
      package: its name.
      version: the first version that has it.
      until: the first version that no longer has it; '' for a change that stays.
      kind: of what broke. ``stream``: other random numbers; ``numeric``: other results.
      what: what happened and, where there is one, the way out.
      reference: where it is told.
      checked: whether it was looked up in the releases themselves.
      defect: whether it is a fault that whoever has the version has, and no one-time change.
    """

    package: str
    version: str
    until: str
    kind: Kind
    what: str
    reference: str
    checked: bool = False
    defect: bool = False


NEW_FLAX = "flax>=0.12.10 (needs Python 3.12 or newer), or jax<0.11.1"
OLDER_JAX = "flax>=0.12.7 with jax>=0.10.0, or jax<0.8.2"
BAD_PAIRS = (
    BadPair(
        ">=0.11.2", ">=0.12.7,<0.12.10",
        "module 'jax.experimental.hijax' has no attribute 'HiPrimitive'",
        NEW_FLAX, "google/flax#5596, jax-md/jax-md#423, netket/netket#2280",
    ),
    BadPair(
        ">=0.11.1,<0.11.2", ">=0.12.7,<0.12.9",
        "module 'jax.experimental.hijax' has no attribute 'MutableHiType'",
        NEW_FLAX, "marimo-team/marimo#10646, pfackeldey/evermore#116",
    ),
    BadPair(
        ">=0.11.0", ">=0.12.2,<0.12.7", "jax.core.Effect was removed in JAX v0.11.0",
        "flax>=0.12.10 (needs Python 3.12 or newer), or jax<0.11.0", "",
    ),
    BadPair(
        ">=0.8.2", ">=0.11,<0.12.2",
        "jit() got an unexpected keyword argument 'abstracted_axes' (from jax 0.9 also: cannot"
        " import name 'mutable_array')", OLDER_JAX, "",
    ),
    BadPair(
        ">=0.8.0", "<0.11", "cannot import name 'mutable_array' from 'jax._src.core'",
        "flax>=0.12.7 with jax>=0.10.0, or jax<0.8.0", "",
    ),
    BadPair(
        "<0.10.0", ">=0.12.7", "cannot import name 'Effect' from 'jax.extend.core'",
        "jax>=0.10.0, or flax<0.12.7", "flax's own requirement",
    ),
    BadPair(
        "<0.8.1", ">=0.12.1,<0.12.7", "cannot import name 'hijax' from 'jax.experimental'",
        "jax>=0.8.1, or flax<0.12.1", "flax's own requirement",
    ),
)  # fmt: skip

INCIDENTS = (
    Incident(
        "jax", "0.4.33", "", "numeric", "GPU: the first step's loss is that of 0.4.30, its"
        " gradients explode. Compare gradients and steps, not outputs alone.",
        "jax-ml/jax#24114, openxla/xla#17922",
    ),
    Incident(
        "jax", "0.4.36", "", "API", "the tracing machinery was rewritten ('stackless'): libraries"
        " that use JAX's internals must match it.", "jax changelog",
    ),
    Incident(
        "jax", "0.5.0", "", "stream", "jax_threefry_partitionable is on by default: every"
        " initialisation, dropout mask and sample of a seed changes. The old numbers:"
        " JAX_THREEFRY_PARTITIONABLE=false.", "jax-ml/jax#13346, kokabsc/gwkokab#426", checked=True,
    ),
    Incident(
        "jax", "0.6.0", "", "API", "jax.tree_map is gone: jax.tree.map.", "jax changelog",
        checked=True,
    ),
    Incident(
        "jax", "0.7.0", "", "numeric", "gradients are linearised directly"
        " (jax_use_direct_linearize) and programs are partitioned by Shardy"
        " (jax_use_shardy_partitioner) by default: some numbers change. Both are flags.",
        "jax changelog", checked=True,
    ),
    Incident(
        "jax", "0.7.0", "0.7.2", "crash", "segmentation faults with Equinox. Use jax>=0.7.2.",
        "patrick-kidger/equinox#1084, jax-ml/jax#30517", defect=True,
    ),
    Incident(
        "jax", "0.7.2", "", "stream", "jax.random.randint of 8 and 16 bits draws other, unbiased"
        " numbers (jax_safer_randint).", "jax-ml/jax#27742", checked=True,
    ),
    Incident(
        "jax", "0.8.0", "", "API", "jax.util is gone; pmap is made of jit and shard_map.",
        "jax changelog, patrick-kidger/equinox#1120", checked=True,
    ),
    Incident(
        "jax", "0.9.0", "", "API", "jax.make_mesh makes Explicit axes by default (Auto before):"
        " pass axis_types.", "jax changelog", checked=True,
    ),
    Incident(
        "jax", "0.10.0", "", "API", "jax.device_put_replicated and device_put_sharded are gone:"
        " jax.device_put.", "google/brax#671", checked=True,
    ),
    Incident(
        "jax", "0.10.0", "", "numeric", "jnp.arange with a fractional step in bfloat16 rounds"
        " differently (0.9 as an element: 0.898 instead of 0.902).", "both releases run",
        checked=True,
    ),
    Incident(
        "jax", "0.11.0", "", "API", "needs Python 3.12 or newer.", "jax changelog", checked=True,
    ),
    Incident(
        "jax", "0.11.0", "", "numeric", "jnp.empty is no longer filled with zeros.",
        "jax changelog", checked=True,
    ),
    Incident(
        "jax", "0.11.1", "", "import", "flax.nnx of flax<0.12.9 cannot be imported.",
        "marimo-team/marimo#10646", checked=True,
    ),
    Incident(
        "jax", "0.11.2", "", "import", "flax.nnx of flax<0.12.10 cannot be imported.",
        "google/flax#5596, jax-md/jax-md#423", checked=True,
    ),
    Incident(
        "flax", "0.6.0", "", "API", "flax.optim is gone: optax.",
        "google-research/vision_transformer#232",
    ),
    Incident(
        "flax", "0.7.1", "", "API", "Linen returns dict, no FrozenDict: masks and labels of optax"
        " must be of the same type.", "google-deepmind/optax#160",
    ),
    Incident(
        "flax", "0.11.0", "", "API", "nnx.Optimizer needs wrt= and update(model, grads); modules"
        " are pytrees; VariableState is gone.", "google/flax#4800", checked=True,
    ),
    Incident(
        "flax", "0.11.0", "", "checkpoint", "each NNX layer forks its Rngs: the state has other"
        " entries, old checkpoints and split_rngs under scan change.", "google/flax#4800",
    ),
    Incident(
        "flax", "0.12.0", "", "API", "a list, tuple or dict of arrays or modules as an attribute"
        " raises ValueError: nnx.List, nnx.Dict, nnx.data.",
        "jax-ml/bonsai#47, sgl-project/sglang-jax#320", checked=True,
    ),
    Incident(
        "flax", "0.12.1", "", "API", "Variable.value is deprecated: variable[...]; sharded"
        " variables need a mesh when they are made.", "jax-ml/bonsai#135,"
        " AI-Hypercomputer/maxtext#3802",
    ),
    Incident(
        "flax", "0.12.1", "", "numeric", "nnx.BatchNorm(dtype=bfloat16) rounds its running"
        " statistics to bfloat16 before it uses them: evaluation is wrong where the mean is large."
        " flaxstab.norms.BatchNorm keeps them in float32.",
        "source of 0.12.0, 0.12.1 and 0.12.12",
        checked=True, defect=True,
    ),
    Incident(
        "flax", "0.12.4", "", "API", "set_mode and train_mode are gone: nnx.view, set_view.",
        "google/flax#5204", checked=True,
    ),
    Incident(
        "flax", "0.12.7", "", "API", "nnx.pure is called as_pure (from 0.12.8 vars_as is"
        " with_vars); needs jax>=0.10.0.", "pfackeldey/evermore#106", checked=True,
    ),
    Incident(
        "flax", "0.12.9", "", "API", "needs Python 3.12 or newer, and jax>=0.11.1.",
        "its wheel", checked=True,
    ),
    Incident(
        "flax", "0.12.12", "", "numeric", "nnx.WeightNorm's scales are nnx.Param: they are trained,"
        " and checkpoints have them.", "source of 0.12.10 and 0.12.12", checked=True,
    ),
    Incident(
        "torch", "2.6.0", "", "API", "torch.load reads weights only by default: pickled objects are"
        " refused.", "speechbrain/speechbrain#2856",
    ),
    Incident(
        "torch", "1.12.0", "", "numeric", "GPU: matrix products no longer use TF32 by default;"
        " convolutions still do.", "torch's CUDA notes",
    ),
)  # fmt: skip


def bad_pairs(versions: Mapping[str, str | None]) -> tuple[BadPair, ...]:
    """Returns why a set of versions cannot be imported; ``()`` if nothing is known against it.

    Example:
      >>> bad_pairs({"jax": "0.11.1", "flax": "0.12.8"})[0].fails
      "module 'jax.experimental.hijax' has no attribute 'MutableHiType'"
    """
    jax, flax = versions.get("jax"), versions.get("flax")
    if not jax or not flax:
        return ()
    return tuple(pair for pair in BAD_PAIRS if within(jax, pair.jax) and within(flax, pair.flax))


def incidents(
    before: Mapping[str, str | None], after: Mapping[str, str | None]
) -> tuple[Incident, ...]:
    """Returns what is known to have changed between two sets of versions, in either direction.

    Example:
      >>> [found.kind for found in incidents({"jax": "0.4.38"}, {"jax": "0.5.3"})]
      ['stream']
    """
    return tuple(known for known in INCIDENTS if _lies_between(known, before, after))


def standing(versions: Mapping[str, str | None]) -> tuple[Incident, ...]:
    """Returns the known faults that whoever has these versions has.

    Example:
      >>> [found.kind for found in standing({"jax": "0.7.1", "flax": "0.12.0"})]
      ['crash']
    """
    return tuple(known for known in INCIDENTS if known.defect and _has(known, versions))


def ahead(versions: Mapping[str, str | None]) -> tuple[Incident, ...]:
    """Returns the known changes of releases newer than these versions."""
    return tuple(
        known
        for known in INCIDENTS
        if (now := versions.get(known.package)) and order(now) < key(known.version)
    )


def _lies_between(
    known: Incident, before: Mapping[str, str | None], after: Mapping[str, str | None]
) -> bool:
    old, new = before.get(known.package), after.get(known.package)
    if not old or not new:
        return False
    first, last = sorted((old, new), key=order)
    crossed = order(first) < key(known.version) <= order(last)
    return crossed and (not known.until or _has(known, after) != _has(known, before))


def _has(known: Incident, versions: Mapping[str, str | None]) -> bool:
    now = versions.get(known.package)
    if not now or order(now) < key(known.version):
        return False
    return not known.until or order(now) < key(known.until)
