"""Weights of torchvision's ResNets and timm's ViTs in flaxstab's models: logits and gradients.

torchvision and timm live in an environment of their own, whose python is named; nothing of it is
imported here:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 torchvision timm safetensors
    python benchmarks/weights_peers.py peers/bin/python

For each model that environment writes the state_dict (random weights, random running statistics),
images, a random cotangent of the logits, and PyTorch's logits and gradients in float32 and float64,
in evaluation. Here the weights are loaded, and checked:

- accounted for: every tensor is loaded (``num_batches_tracked``, too) and every variable filled,
  as many parameters as the peer counts;
- round trip: what flaxstab writes back is the same, bit by bit;
- logits and gradients in float32: their distance from PyTorch's float64, over that of its own
  float32. Logits: the root mean square, at most 2; and the largest element, at most twice PyTorch's
  plus 2 eps of the largest logit (one element of 2,000 is a matter of chance). Gradients: the root
  mean square over all parameters, at most 2; and how many tensors' largest error is above twice
  PyTorch's plus 2 eps of the tensor's largest value. In float32 a value may round to the other side
  of ReLU's kink, on either side, and change every gradient below it: where gradients fail, other
  images are drawn, up to twice, and the row says how often;
- float64: the largest distance over the largest value (of logits; of the worst gradient), at most
  1e-12: the same program.

Exit code 1 if a model fails. Takes about 10 minutes for all on one core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VITS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
BATCH, SIDE = 2, 64  # of images for ResNets; ViTs take 224
DRAWS = 3  # of images, at most
EPS = float(np.finfo(np.float32).eps)

Arrays = dict[str, np.ndarray]


def write(name: str, folder: Path, draw: int) -> None:
    """Writes a model's weights and results; runs in the peers' environment, which has no JAX."""
    import torch
    from safetensors.numpy import save_file

    torch.manual_seed(0)
    model = _drawn(name).eval()
    side = SIDE if name in RESNETS else 224
    torch.manual_seed(1 + draw)
    images, cotangent = torch.randn(BATCH, 3, side, side), torch.randn(BATCH, 1000)
    state = {n: t.numpy() for n, t in model.state_dict().items()}
    save_file(
        {n: np.asarray(a, order="C") for n, a in state.items()}, folder / "weights.safetensors"
    )
    found: Arrays = {"images": images.numpy(), "cotangent": cotangent.numpy()}
    for kind in (torch.float32, torch.float64):
        copied = model.to(kind)
        x = images.to(kind).requires_grad_()
        logits = copied(x)
        params = dict(copied.named_parameters())
        grads = torch.autograd.grad(logits, [x, *params.values()], cotangent.to(kind))
        bits = str(kind)[-2:]
        found[f"logits {bits}"] = logits.detach().numpy()
        found |= {f"grad{bits} {n}": g.numpy() for n, g in zip(["images", *params], grads)}  # noqa: B905
    np.savez(folder / "results.npz", **found)
    (folder / "about.json").write_text(json.dumps(_about(model)))


def _drawn(name: str) -> "torch.nn.Module":  # noqa: F821
    """Returns a model with random weights and statistics, of a size that depth does not blow up."""
    import torch

    # PyPI's torchvision is linked against CUDA. Beside a CPU build of torch its compiled operators
    # do not load and its import fails for want of these two, which no model here calls.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    if not hasattr(torch.ops.torchvision, "nms"):
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if name in RESNETS:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None)
        last = "bn3" if name in RESNETS[2:] else "bn2"
    else:
        import timm

        model, last = timm.create_model(name, pretrained=False), ""
    for place, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0.0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(1234)
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            ends = bool(last) and place.endswith(last)
            torch.nn.init.normal_(module.weight, 0.25 if ends else 1.0, 0.1)
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
    return model


def _about(model: "torch.nn.Module") -> dict[str, object]:  # noqa: F821
    import torch

    versions = {n: sys.modules[n].__version__ for n in ("torchvision", "timm") if n in sys.modules}
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "versions": {"torch": torch.__version__, **versions}}


def read(name: str, folder: Path) -> dict[str, object]:
    """Loads a model's weights here; returns what was measured."""
    import jax
    from flax import nnx
    from safetensors.numpy import load_file

    from flaxstab import interop, models

    weights, found = load_file(folder / "weights.safetensors"), np.load(folder / "results.npz")
    about = json.loads((folder / "about.json").read_text())
    rename = None if name in RESNETS else models.from_timm
    model = getattr(models, name)(rngs=nnx.Rngs(0))
    start = time.perf_counter()
    report = interop.load_state_dict(model, weights, rename=rename)
    seconds = time.perf_counter() - start
    row = {"model": name, **about, "tensors": len(weights), "load seconds": seconds}
    row["accounted for"] = len(report.loaded) == len(weights) and about["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    row["round trip"] = _same_bits(interop.state_dict(model), weights, rename)
    for bits in (32, 64):
        with jax.enable_x64(bits == 64):
            logits, grads = _results(model, found["images"], found["cotangent"], f"float{bits}")
        row |= _distances(bits, logits, grads, found, rename)
    return row | {"passed": _passed(row)}


def _same_bits(ours: Mapping[str, np.ndarray], theirs: Arrays, rename: object) -> bool:
    named = {rename(n) if callable(rename) else n: a for n, a in theirs.items()}
    return ours.keys() == named.keys() and all(
        ours[n].dtype == a.dtype and ours[n].shape == a.shape and ours[n].tobytes() == a.tobytes()
        for n, a in named.items()
    )


def _results(
    model: object, images: np.ndarray, cotangent: np.ndarray, kind: str
) -> tuple[np.ndarray, Arrays]:
    """Returns logits, and gradients by PyTorch's names, in evaluation."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flaxstab import interop

    model.eval()
    naming = interop.Naming(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    cast = lambda a: jnp.asarray(a, kind) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    params, rest = jax.tree.map(cast, (params, rest))

    @jax.jit
    def run(params: object, rest: object, x: jax.Array, back: jax.Array) -> object:
        logits, pull = jax.vjp(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x)
        return logits, *pull(back)

    x = jnp.asarray(np.moveaxis(images, 1, -1), kind)
    logits, grads, grad = run(params, rest, x, jnp.asarray(cotangent, kind))
    named = dict(naming.tensors(grads, gradients=True))
    return np.asarray(logits), named | {"images": np.moveaxis(np.asarray(grad), -1, 1)}


def _distances(
    bits: int, logits: np.ndarray, grads: Arrays, found: Mapping[str, np.ndarray], rename: object
) -> dict[str, object]:
    """Returns the errors of a precision against PyTorch's float64."""
    names = [n.removeprefix("grad64 ") for n in found if n.startswith("grad64 ")]
    exact = found["logits 64"]
    size = np.abs(exact).max()
    error = np.abs(logits - exact).max()
    above, ours, theirs, worst = 0, 0.0, 0.0, 0.0
    for n in names:
        right = found[f"grad64 {n}"]
        mine = grads[rename(n) if callable(rename) else n] - right
        other = found[f"grad{bits} {n}"] - right
        scale = max(np.abs(right).max(), np.finfo(float).tiny)
        worst = max(worst, np.abs(mine).max() / scale)
        above += bool(np.abs(mine).max() > 2 * np.abs(other).max() + 2 * EPS * scale)
        ours, theirs = ours + (mine**2).sum() / scale**2, theirs + (other**2).sum() / scale**2
    if bits == 64:
        return {"logits 64": error / size, "worst gradient 64": worst}
    base = np.abs(found["logits 32"] - exact).max()
    rms, own = (np.sqrt(np.mean((a - exact) ** 2)) for a in (logits, found["logits 32"]))
    return {
        "logits: torch": base / size,
        "logits: ours / torch": rms / own,
        "largest logit: ours / torch": error / base,
        "largest logit within": bool(error <= 2 * base + 2 * EPS * size),
        "gradients: ours / torch": float(np.sqrt(ours / theirs)),
        "gradients above": f"{above} of {len(names)}",
    }


def _passed(row: Mapping[str, object]) -> bool:
    return bool(
        row["accounted for"]
        and row["round trip"]
        and row["logits: ours / torch"] <= 2
        and row["largest logit within"]
        and row["gradients: ours / torch"] <= 2
        and max(row["logits 64"], row["worst gradient 64"]) <= 1e-12
    )


def measured(python: str, name: str) -> dict[str, object]:
    """Returns one model's row: written in the environment of ``python``, read in this one."""
    row: dict[str, object] = {}
    for draw in range(DRAWS):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--models", name, "--write", folder, "--draw", str(draw)]
            subprocess.run([python, __file__, python, *options], check=True)  # noqa: S603
            row = read(name, Path(folder)) | {"draws": draw + 1}
        if row["gradients: ours / torch"] <= 2:
            break
    return row


def main(arguments: list[str] | None = None) -> int:
    """Runs the models one by one; returns 0 if all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="the python of the environment with torchvision and timm")
    parser.add_argument("--models", nargs="+", default=[*RESNETS, *VITS], metavar="NAME")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--draw", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.models if name not in RESNETS + VITS]
    if unknown:
        parser.error(f"--models must be of {', '.join(RESNETS + VITS)}, got {', '.join(unknown)}")
    if chosen.write is not None:
        write(chosen.models[0], chosen.write, chosen.draw)
        return 0
    rows = []
    for name in chosen.models:
        rows.append(measured(chosen.python, name))
        print(json.dumps(rows[-1], default=float), flush=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, default=float, indent=2) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
