"""The text of a script that shows one difference by itself: jax, flax, optax, torch and numpy."""

import pprint
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from flaxstab.parity._inputs import Layout, is_float, is_integral
from flaxstab.parity._sources import Call, folders, imports

INLINE = 400  # numbers in all that a script spells out; more lie beside it

Arrays = Sequence[tuple[str, np.ndarray | None]]  # None: what the constructor makes, such as a key


class Side(NamedTuple):
    """One side of a difference.

    Attributes:
      call: makes the module, names the function, or makes the optimizer.
      arrays: what the module holds, with names; of a function None.
    """

    call: Call
    arrays: Arrays | None = None


class Quantity(NamedTuple):
    """What differs, and how each side's script comes by it.

    Attributes:
      name: as the report calls it.
      kind: what is returned: an output, the gradient of an input or of a parameter, or a buffer.
      steps: how many training steps are made first, or as the last of which it is seen.
      evaluates: whether an evaluation follows them.
      pick: the index of the output, such as ``'[0]'``.
      place: of the input or of Flax's variable.
      torch_name: of the parameter or buffer.
      move: what brings Flax's array into PyTorch's layout, as code.
    """

    name: str
    kind: Literal["output", "grad input", "grad", "buffer", "optimizer"]
    steps: int = 1
    evaluates: bool = False
    pick: str = ""
    place: int = 0
    torch_name: str = ""
    move: str = ""


class Specimen(NamedTuple):
    """A difference with all that is needed to show it.

    Attributes:
      flax: JAX's side.
      torch: PyTorch's.
      inputs: features last; of optimizers the parameters.
      cotangents: of the outputs, by their index; of optimizers the gradients of each step.
      layout: as in :func:`compare`.
      quantity: what differs.
      dtype: in which precision.
      bound: what may differ, over the largest value: in float64 of the difference, else of what
        is allowed beside twice the other side's error.
      mask: the probability, if PyTorch's side is a dropout that takes JAX's mask.
    """

    flax: Side
    torch: Side
    inputs: tuple[np.ndarray, ...]
    cotangents: Arrays
    layout: Layout
    quantity: Quantity
    dtype: str
    bound: float
    mask: float | None = None


class Script(NamedTuple):
    """A script's text, and the arrays that lie beside it."""

    text: str
    arrays: dict[str, np.ndarray]


def script(specimen: Specimen, title: str = "", written_by: str = "") -> Script:
    """Returns a script that exits with 1 while a difference exists, and with 0 when it is gone.

    Args:
      specimen: the difference.
      title: one line that says what differs.
      written_by: versions, for the script's own words.
    """
    held = _Held(specimen)
    lines = imports(specimen.flax.call.text, specimen.torch.call.text)
    optimizes = specimen.quantity.kind == "optimizer"
    wanted = {
        "import jax", "import jax.numpy as jnp", "import numpy as np", "import torch",
        *(["import optax"] if optimizes else []),
        *([] if specimen.flax.arrays is None else ["from flax import nnx"]),
    }  # fmt: skip
    own = sorted({*lines} - wanted)
    paths = "".join(f"sys.path.insert(0, {folder!r})\n" for folder in folders(own))
    parts = [
        _HEAD.format(title=title.replace("\\", "/").replace('"""', "'''"), by=written_by),
        _import_lines(wanted, own, paths, data=bool(held.stored)),
        held.constants,
        _OPTIMIZER_JAX if optimizes else _jax_side(specimen),
        _OPTIMIZER_TORCH if optimizes else _torch_side(specimen),
        _TAIL_WIDE if specimen.dtype == "float64" else _TAIL_LOW,
        _MAIN,
    ]
    head, *others = (part.strip("\n") for part in parts)
    text = head + "\n\n" + "\n\n\n".join(others).replace("\n\n\nDTYPE", "\n\nDTYPE") + "\n"
    for mark, code in {
        "{FLAX}": specimen.flax.call.text,
        "{TORCH}": specimen.torch.call.text,
    }.items():
        text = text.replace(mark, code)
    return Script(text, held.stored)


def _import_lines(wanted: set[str], own: list[str], paths: str, *, data: bool) -> str:
    first = ["import sys", *(["from pathlib import Path"] if data else [])]
    theirs = sorted(wanted, key=lambda line: line.split()[1])
    return "\n".join(first) + "\n\n" + "\n".join(theirs) + "\n" + paths + "\n".join(own)


class _Held:
    """The arrays of a specimen as code, spelled out or beside the script."""

    def __init__(self, specimen: Specimen) -> None:
        self._specimen = specimen
        sides = [specimen.flax.arrays or (), specimen.torch.arrays or (), specimen.cotangents]
        known = [a for arrays in sides for _, a in arrays if a is not None]
        self._inline = sum(a.size for a in (*specimen.inputs, *known)) <= INLINE
        self.stored: dict[str, np.ndarray] = {}
        self.constants = self._constants()

    def _constants(self) -> str:
        one, quantity = self._specimen, self._specimen.quantity
        inputs = [(f"input {i}", a) for i, a in enumerate(one.inputs)]
        parts = [f'DTYPE = "{one.dtype}"']
        if not self._inline:
            load = 'np.load(Path(__file__).with_suffix(".npz"), allow_pickle=False)'
            parts.append(f"with {load} as file:\n    DATA = dict(file)")
        parts.append(f"INPUTS = {self._list('', inputs)}")
        parts.append(f"BOUND = {one.bound!r}  # of the largest value: what rounding may do")
        if one.flax.arrays is not None:
            parts.append(f"FLAX = {self._list('flax ', one.flax.arrays)}")
        if one.torch.arrays is not None:
            parts.append(f"TORCH = {self._dict(one.torch.arrays)}")
        if quantity.kind == "optimizer":
            parts.append(f"GRADIENTS = {self._list('', one.cotangents)}  # of each step")
        elif quantity.kind.startswith("grad"):
            parts.append(f"COTANGENTS = {self._list('', one.cotangents)}")
        return "\n".join(parts)

    def _list(self, prefix: str, arrays: Arrays) -> str:
        items = [f"    {self._code(prefix + n, a)},  # {n}" for n, a in arrays]
        return "\n".join(["[", *items, "]"]) if items else "[]"

    def _dict(self, arrays: Arrays) -> str:
        items = [f'    "{n}": {self._code("torch " + n, a)},' for n, a in arrays]
        return "\n".join(["{", *items, "}"]) if items else "{}"

    def _code(self, name: str, array: np.ndarray | None) -> str:
        if array is None:
            return "None"
        wide = array.astype(np.float64) if is_float(array) else array
        if not self._inline:
            self.stored[name] = wide
            return f'DATA["{name}"]'
        numbers = pprint.pformat(wide.tolist(), width=88, compact=True).replace("\n", "\n    ")
        numbers = numbers.replace("nan", "np.nan").replace("inf", "np.inf")
        return f"np.array({numbers}, np.{wide.dtype.name})" + _shaped(wide)


def _shaped(array: np.ndarray) -> str:
    return f".reshape{array.shape}" if array.size == 0 else ""


def _grows(specimen: Specimen) -> list[bool]:
    return [is_float(a) and not is_integral(a) for a in specimen.inputs]


def _fed(specimen: Specimen) -> str:
    """Returns the code of a step's inputs."""
    if specimen.quantity.steps == 1:
        return "*xs"
    grows = _grows(specimen)
    if all(grows):
        return "*[x * (1 + step / 8) for x in xs]"
    return f"*[x * (1 + step / 8) if grows else x for x, grows in zip(xs, {grows})]"


def _jax_side(specimen: Specimen) -> str:
    quantity = specimen.quantity
    module = specimen.flax.arrays is not None
    text = _JAX_MODULE if module else _JAX_FUNCTION
    call, after = ("run(graph, leaves, {})", "output, leaves") if module else ("run({})", "output")
    body = []
    if quantity.kind.startswith("grad"):
        given = "leaves" if quantity.kind == "grad" else "xs"
        moved = call.format("*given") if given == "xs" else "run(graph, given, *xs)"
        outputs = f"{moved}[0]" if module else moved
        terms = [
            f"jnp.sum(output{pick} * jnp.asarray(COTANGENTS[{i}], output{pick}.dtype))"
            for i, (pick, _) in enumerate(specimen.cotangents)
        ]
        body = [
            "def loss(moving):",
            f"    given = list({given})",
            f"    given[{quantity.place}] = moving",
            f"    output = {outputs}",
            f"    return {' + '.join(terms)}",
            "",
            f"result = jax.grad(loss)({given}[{quantity.place}])",
        ]
    else:
        indent = "" if quantity.steps == 1 else "    "
        body = [] if quantity.steps == 1 else [f"for step in range({quantity.steps}):"]
        body.append(f"{indent}{after} = {call.format(_fed(specimen))}")
        if quantity.evaluates:
            body += ["layer.eval()", "graph = nnx.split(layer)[0]"]
            body.append(f"{after} = {call.format('*xs')}")
        picked = (
            f"leaves[{quantity.place}]" if quantity.kind == "buffer" else f"output{quantity.pick}"
        )
        body.append(f"result = {picked}")
    body.append(f"return np.asarray(result, np.float64){quantity.move}")
    mask = "" if specimen.mask is None else _JAX_MASK
    return text + "\n".join(f"        {line}".rstrip() for line in body) + mask


def _torch_side(specimen: Specimen) -> str:
    quantity, image = specimen.quantity, specimen.layout == "image"
    module = specimen.torch.arrays is not None
    text = _AS_TORCH_IMAGE if image else _AS_TORCH
    text += _TORCH_MODULE if module else _TORCH_FUNCTION
    if specimen.mask is not None:
        text += f"    kept = as_torch(jax_mask(dtype), kind) / (1 - {specimen.mask!r})\n"
        text += "    layer = lambda x: x * kept  # dropout with the mask that JAX drew\n"
    body = []
    if quantity.steps > 1:
        body.append(f"for step in range({quantity.steps}):")
        body.append(f"    output = layer({_fed(specimen)})")
    elif not quantity.evaluates or module:
        body.append("output = layer(*xs)")
    if quantity.evaluates:
        body += ["layer.eval()"] if module else []
        body.append("output = layer(*xs)")
    if quantity.kind.startswith("grad"):
        for i, (pick, _) in enumerate(specimen.cotangents):
            body.append(f"cotangent{i} = as_torch(COTANGENTS[{i}], kind)")
            body.append(f"(output{pick} * cotangent{i}).sum().backward(retain_graph=True)")
    picked = {
        "output": f"output{quantity.pick}",
        "grad input": f"xs[{quantity.place}].grad",
        "grad": f'dict(layer.named_parameters())["{quantity.torch_name}"].grad',
        "buffer": f'layer.state_dict()["{quantity.torch_name}"]',
    }[quantity.kind]
    last = "as_numpy" if quantity.kind in ("output", "grad input") else "plain"
    body.append(f"return {last}({picked})")
    return text + "\n".join(f"    {line}" for line in body)


_HEAD = '''"""{title}

Exit code: 1 while the difference exists, 0 when it is gone.
{by}
"""'''

_JAX_MODULE = '''
def as_jax(array, dtype):
    floats = np.issubdtype(array.dtype, np.floating)
    return jnp.asarray(array, dtype) if floats else jnp.asarray(array)


def jax_side(dtype):
    """Computes the quantity with JAX."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        layer = {FLAX}
        layer.train()
        graph, state = nnx.split(layer)
        made, tree = jax.tree.flatten(state)
        wide = "float64" if dtype == "float64" else "float32"
        leaves = [old if new is None else as_jax(new, wide) for old, new in zip(made, FLAX)]
        xs = [as_jax(x, dtype) for x in INPUTS]

        def run(graph, leaves, *xs):
            model = nnx.merge(graph, jax.tree.unflatten(tree, leaves), copy=True)
            output = model(*xs)
            return output, jax.tree.leaves(nnx.split(model)[1])

        run = jax.jit(run, static_argnums=0)
'''

_JAX_FUNCTION = '''
def as_jax(array, dtype):
    floats = np.issubdtype(array.dtype, np.floating)
    return jnp.asarray(array, dtype) if floats else jnp.asarray(array)


def jax_side(dtype):
    """Computes the quantity with JAX."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        run = jax.jit({FLAX})
        xs = [as_jax(x, dtype) for x in INPUTS]
'''

_JAX_MASK = '''


def jax_mask(dtype):
    """Returns 1 where JAX's dropout keeps an element, and else 0."""
    with jax.enable_x64(dtype == "float64"):
        layer = {FLAX}
        layer.train()
        return np.asarray(layer(jnp.ones(INPUTS[0].shape)) != 0, np.float64)
'''

_AS_TORCH = """
def as_torch(array, kind):
    floats = np.issubdtype(array.dtype, np.floating)
    return torch.tensor(array).to(kind) if floats else torch.tensor(array)


def as_numpy(tensor):
    return plain(tensor)


def plain(tensor):
    return tensor.detach().double().numpy()
"""

_AS_TORCH_IMAGE = """
def as_torch(array, kind):
    if not np.issubdtype(array.dtype, np.floating):
        return torch.tensor(array)
    first = np.moveaxis(array, -1, 1) if array.ndim > 2 else array  # channels
    return torch.tensor(np.ascontiguousarray(first)).to(kind)


def as_numpy(tensor):
    array = plain(tensor)
    return np.moveaxis(array, 1, -1) if array.ndim > 2 else array


def plain(tensor):
    return tensor.detach().double().numpy()
"""

_TORCH_MODULE = '''

def torch_side(dtype):
    """Computes the quantity with PyTorch."""
    kind = getattr(torch, dtype)
    layer = {TORCH}
    layer.to(kind)
    if kind.itemsize < 4 and any("running" in name for name, _ in layer.named_buffers()):
        layer.float()  # statistics stay in float32, as in Flax
    layer.load_state_dict({name: torch.tensor(array) for name, array in TORCH.items()})
    layer.train()
    xs = [as_torch(x, kind) for x in INPUTS]
    xs = [x.requires_grad_() if x.is_floating_point() else x for x in xs]
'''

_TORCH_FUNCTION = '''

def torch_side(dtype):
    """Computes the quantity with PyTorch."""
    kind = getattr(torch, dtype)
    layer = {TORCH}
    xs = [as_torch(x, kind) for x in INPUTS]
    xs = [x.requires_grad_() if x.is_floating_point() else x for x in xs]
'''

_OPTIMIZER_JAX = '''
def jax_side(dtype):
    """Computes what the steps change the parameter by, with JAX."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        tx = {FLAX}
        params = [jnp.asarray(INPUTS[0], dtype)]
        state, update = tx.init(params), jax.jit(tx.update)
        for gradient in GRADIENTS:
            changes, state = update([jnp.asarray(gradient, dtype)], state, params)
            params = optax.apply_updates(params, changes)
        return np.asarray(params[0], np.float64) - INPUTS[0]
'''

_OPTIMIZER_TORCH = '''
def torch_side(dtype):
    """Computes what the steps change the parameter by, with PyTorch."""
    kind = getattr(torch, dtype)
    param = torch.nn.Parameter(torch.tensor(INPUTS[0]).to(kind))
    optimizer = ({TORCH})([param])
    for gradient in GRADIENTS:
        param.grad = torch.tensor(gradient).to(kind)
        optimizer.step()
    return param.detach().double().numpy() - INPUTS[0]
'''

_GAP = '''
def gap(a, b):
    """Returns the absolute differences; infinite where one side alone is not finite."""
    if a.shape != b.shape:
        return np.array(np.inf)
    with np.errstate(invalid="ignore"):
        away = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isnan(away), np.inf, away))


def largest(array):
    return np.max(np.abs(array), initial=0.0, where=np.isfinite(array))
'''

_TAIL_WIDE = (
    _GAP
    + '''

def measure():
    """Returns both results, what each should be, the error and what it may be."""
    ours, theirs = jax_side("float64"), torch_side("float64")
    limit = BOUND * max(largest(ours), largest(theirs))
    return ours, theirs, (ours, theirs), np.max(gap(ours, theirs), initial=0.0), limit
'''
)

_TAIL_LOW = (
    _GAP
    + '''

def measure():
    """Returns both results, what each should be, JAX's error and what it may be."""
    ours, theirs = jax_side(DTYPE), torch_side(DTYPE)
    truths = jax_side("float64"), torch_side("float64")
    errors = [np.max(gap(a, b), initial=0.0) for a, b in zip((ours, theirs), truths)]
    limit = 2 * errors[1] + BOUND * largest(truths[0])
    return ours, theirs, truths, errors[0], limit
'''
)

_MAIN = """
def main():
    ours, theirs, truths, error, limit = measure()
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    print(f"JAX in {DTYPE}:\\n{ours}\\nPyTorch in {DTYPE}:\\n{theirs}")
    if DTYPE != "float64":
        print(f"JAX in float64:\\n{truths[0]}\\nPyTorch in float64:\\n{truths[1]}")
    ratio = error / limit if limit else np.inf * error if error else 0.0
    exists = not error <= limit
    print(f"error {error:.3g}, limit {limit:.3g}: {ratio:.3g} x the limit ({versions})")
    print("the difference exists" if exists else "the difference is gone")
    return int(exists)


if __name__ == "__main__":
    sys.exit(main())
"""
