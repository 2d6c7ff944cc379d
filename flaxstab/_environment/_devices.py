"""What each framework computes on, and how precisely: measured, not only read from its flags."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FRAMEWORKS = {
    "numpy": "numpy",
    "jax": "jax",
    "flax": "flax.nnx",
    "optax": "optax",
    "torch": "torch",
}
BITS = 23  # of a float32's mantissa  # fmt: skip
SIDE = 128  # of the probe's matrices: large enough that GPUs use their matrix units
SPACE = 8  # height and width of its image  # fmt: skip


def probe() -> dict[str, object]:
    """Imports the frameworks, lists their devices and measures their precision; never raises."""
    failed = {name: import_error(module) for name, module in FRAMEWORKS.items()}
    return {
        "imports": failed,
        "jax": {} if failed["jax"] else _said(_jax),
        "torch": {} if failed["torch"] else _said(_torch),
    }


def import_error(module: str) -> str:
    """Returns why a module cannot be imported; '' if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except Exception as error:
        return said(error)
    return ""


def said(error: BaseException) -> str:
    """Returns an error in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _said(ask: Callable[[], dict[str, object]]) -> dict[str, object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ask()
    except Exception as error:
        return {"error": said(error)}


def _jax() -> dict[str, object]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    def product(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
        return np.asarray(jax.jit(jnp.matmul)(a, b))

    def convolution(image: "np.ndarray", kernel: "np.ndarray") -> "np.ndarray":
        run = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME"))
        return np.asarray(run(image, kernel))

    flags = (
        "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
        "jax_threefry_partitionable", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
    )  # fmt: skip
    return {
        "version": jax.__version__,
        "backend": jax.default_backend(),
        "devices": [
            f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()
        ],
        "flags": {name: getattr(jax.config, name, None) for name in flags},
        "matmul": precision(_bits_of_product(product)),
        "convolution": precision(_bits_of_convolution(convolution)),
    }


def _torch() -> dict[str, object]:
    import numpy as np
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"

    def product(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
        left, right = (torch.tensor(each, device=place) for each in (a, b))
        return np.asarray((left @ right).cpu())

    def convolution(image: "np.ndarray", kernel: "np.ndarray") -> "np.ndarray":
        x, k = (torch.tensor(each, device=place) for each in (image, kernel))
        return np.asarray(torch.nn.functional.conv2d(x, k, padding=1).cpu())

    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "backend": place,
        "devices": [f"cuda:{n} {name}" for n, name in enumerate(names)] or ["cpu"],
        "flags": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": _flag(lambda: torch.backends.cudnn.allow_tf32),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "default_dtype": str(torch.get_default_dtype()),
            "threads": torch.get_num_threads(),
        },
        "matmul": precision(_bits_of_product(product)),
        "convolution": precision(_bits_of_convolution(convolution)),
    }


def _flag(read: Callable[[], object]) -> object:
    """Returns a flag; ``None`` where torch refuses to mix its old and new ways of setting it."""
    with contextlib.suppress(RuntimeError):
        return read()
    return None


def precision(bits: int) -> dict[str, object]:
    """Names a number of mantissa bits that the operands of a product keep.

    Example:
      >>> precision(10)
      {'bits': 10, 'name': 'tf32'}
    """
    names = {23: "float32", 10: "tf32", 7: "bfloat16"}
    return {"bits": bits, "name": names.get(bits, "between" if bits < BITS else "float32")}


def _steps() -> "Iterator[float]":
    """Yields 1 + 2^-n: what an operand with n or more bits of mantissa can hold."""
    return (1 + 2.0**-n for n in range(1, BITS + 1))


def _bits_of_product(product: "Callable[[np.ndarray, np.ndarray], np.ndarray]") -> int:
    import numpy as np

    left = np.ones((SIDE, SIDE), np.float32)
    left[:, :BITS] = list(_steps())
    return _kept(product(left, np.eye(SIDE, dtype=np.float32))[:, :BITS])


def _bits_of_convolution(convolution: "Callable[[np.ndarray, np.ndarray], np.ndarray]") -> int:
    import numpy as np

    image = np.ones((SPACE, SIDE, SPACE, SPACE), np.float32)  # (N, C, H, W)  # fmt: skip
    image[:, :BITS] = np.reshape(list(_steps()), (BITS, 1, 1))
    kernel = np.zeros((SIDE, SIDE, 3, 3), np.float32)
    kernel[:, :, 1, 1] = np.eye(SIDE)
    return _kept(np.moveaxis(convolution(image, kernel)[:, :BITS], 1, -1))


def _kept(result: "np.ndarray") -> int:
    """Returns how many of the steps come out exactly before the first that does not."""
    import numpy as np

    exact = np.all(
        result == np.asarray(list(_steps()), np.float32), axis=tuple(range(result.ndim - 1))
    )
    return int(np.argmin(exact)) if not exact.all() else BITS
