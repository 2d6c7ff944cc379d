"""The fixed parts of a script that shows a difference; FLAX and TORCH stand for what makes them."""

HEAD = '''"""{title}

Exit code: 1 while the difference exists, 0 when it is gone.
{by}
"""'''

JAX_MODULE = '''
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

JAX_FUNCTION = '''
def as_jax(array, dtype):
    floats = np.issubdtype(array.dtype, np.floating)
    return jnp.asarray(array, dtype) if floats else jnp.asarray(array)


def jax_side(dtype):
    """Computes the quantity with JAX."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        run = jax.jit({FLAX})
        xs = [as_jax(x, dtype) for x in INPUTS]
'''

JAX_MASK = '''


def jax_mask(dtype):
    """Returns 1 where JAX's dropout keeps an element, and else 0."""
    with jax.enable_x64(dtype == "float64"):
        layer = {FLAX}
        layer.train()
        return np.asarray(layer(jnp.ones(INPUTS[0].shape)) != 0, np.float64)
'''

AS_TORCH = """
def as_torch(array, kind):
    floats = np.issubdtype(array.dtype, np.floating)
    return torch.tensor(array).to(kind) if floats else torch.tensor(array)


def as_numpy(tensor):
    return plain(tensor)


def plain(tensor):
    return tensor.detach().double().numpy()
"""

AS_TORCH_IMAGE = """
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

TORCH_MODULE = '''

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

TORCH_FUNCTION = '''

def torch_side(dtype):
    """Computes the quantity with PyTorch."""
    kind = getattr(torch, dtype)
    layer = {TORCH}
    xs = [as_torch(x, kind) for x in INPUTS]
    xs = [x.requires_grad_() if x.is_floating_point() else x for x in xs]
'''

OPTIMIZER_JAX = '''
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

OPTIMIZER_TORCH = '''
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

GAP = '''
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

TAIL_WIDE = (
    GAP
    + '''

def measure():
    """Returns both results, what each should be, the error and what it may be."""
    ours, theirs = jax_side("float64"), torch_side("float64")
    limit = BOUND * max(largest(ours), largest(theirs))
    return ours, theirs, (ours, theirs), np.max(gap(ours, theirs), initial=0.0), limit
'''
)

TAIL_LOW = (
    GAP
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

MAIN = """
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
