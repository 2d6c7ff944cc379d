"""What a described environment means: what is wrong in it, what to know of it, what to do."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

from flaxstab._environment._known import bad_pairs, standing
from flaxstab._environment._versions import within

NEEDED = {"jax": ">=0.10.0", "flax": ">=0.12.7", "optax": ">=0.2.6", "numpy": ">=1.26"}
NEEDED_OF_TORCH = {"torch": ">=2.10"}


class Finding(NamedTuple):
    """One thing about an environment.

    Attributes:
      level: ``bad`` if something cannot work, ``note`` if it should be known.
      what: what is so.
      fix: what to do; '' if nothing.
    """

    level: Literal["bad", "note"]
    what: str
    fix: str = ""


def findings(described: Mapping[str, object]) -> tuple[Finding, ...]:
    """Judges what :func:`~flaxstab._environment.describe` returned, the worst first."""
    versions = cast("Mapping[str, str | None]", described["packages"])
    found = (
        *pair_findings(versions),
        *_versions(versions),
        *_imports(described, versions),
        *_sides(described),
        *(Finding("note", f"{known.package} {versions[known.package]}: {known.what}",
                  f"See {known.reference}.") for known in standing(versions)),
    )  # fmt: skip
    return tuple(sorted(found, key=lambda each: each.level))


def pair_findings(versions: Mapping[str, str | None]) -> tuple[Finding, ...]:
    """Says which pair of versions cannot be imported, how it fails, and what to install."""
    return tuple(
        Finding(
            "bad",
            f"jax {versions['jax']} and flax {versions['flax']} cannot be used together: importing"
            f' flax.nnx fails with "{pair.fails}"'
            + (f" (known: {pair.reference})." if pair.reference else "."),
            f"Install {pair.install}.",
        )
        for pair in bad_pairs(versions)
    )


def _versions(versions: Mapping[str, str | None]) -> "Sequence[Finding]":
    found = []
    for name, bounds in (NEEDED | NEEDED_OF_TORCH).items():
        version = versions.get(name)
        if version is None and name in NEEDED:
            found.append(
                Finding("bad", f"{name} is not installed.", f"pip install '{name}{bounds}'")
            )
        elif version is None:
            found.append(
                Finding(
                    "note", f"{name} is not installed: nothing can be compared with PyTorch here.",
                    "pip install 'flaxstab[torch]', or use a recorded baseline.",
                )
            )  # fmt: skip
        elif not within(version, bounds):
            found.append(
                Finding("bad", f"flaxstab needs {name}{bounds}, and {version} is installed.",
                        f"pip install '{name}{bounds}'")
            )  # fmt: skip
    return found


def _imports(
    described: Mapping[str, object], versions: Mapping[str, str | None]
) -> "Sequence[Finding]":
    failed = cast("Mapping[str, str]", described.get("imports", {}))
    found = []
    for name, error in failed.items():
        if error and versions.get(name):
            fix = "" if name == "flax" and bad_pairs(versions) else _reinstall(name, failed)
            what = f"{name} {versions[name]} is installed and cannot be imported: {error}"
            found.append(Finding("bad", what, fix))
    for side in ("jax", "torch"):
        trouble = _at(described, side, "error")
        if trouble:
            found.append(Finding("bad", f"{side} cannot compute here: {trouble}"))
    return found


def _reinstall(name: str, failed: Mapping[str, str]) -> str:
    """Returns what to do about a package that cannot be imported."""
    below = {"flax": ("jax", "numpy"), "optax": ("jax", "numpy"), "jax": ("numpy",)}
    causes = [cause for cause in below.get(name, ()) if failed.get(cause)]
    if causes:
        return f"It needs {causes[0]}, which cannot be imported either: mend that first."
    return f"Reinstall it: pip install --force-reinstall {name}."


def _sides(described: Mapping[str, object]) -> "Sequence[Finding]":
    """Compares how both frameworks compute."""
    found = []
    for product in ("matmul", "convolution"):
        ours, theirs = (_at(_side(described, side), product, "name") for side in ("jax", "torch"))
        if ours and theirs and ours != theirs:
            found.append(
                Finding(
                    "note", f"a float32 {product} is computed in {ours} by JAX and in {theirs} by"
                    " torch: the sides cannot agree to float32.",
                    'jax.config.update("jax_default_matmul_precision", "highest"), and in torch'
                    " torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 ="
                    " False",
                )
            )  # fmt: skip
        elif ours and ours != "float32":
            found.append(
                Finding("note", f"a float32 {product} is computed in {ours} by JAX.",
                        'jax.config.update("jax_default_matmul_precision", "highest")')
            )  # fmt: skip
    backend = _at(described, "jax", "backend")
    flags = str(_at(described, "settings", "XLA_FLAGS") or "")
    if backend == "gpu" and "xla_gpu_deterministic_ops=true" not in flags:
        found.append(
            Finding("note", "JAX's GPU programs may differ from run to run.",
                    "XLA_FLAGS=--xla_gpu_deterministic_ops=true")
        )  # fmt: skip
    return found


def _side(described: Mapping[str, object], side: str) -> Mapping[str, object]:
    return cast("Mapping[str, object]", described.get(side) or {})


def _at(described: Mapping[str, object], *path: str) -> object:
    """Returns an entry of nested dicts; ``None`` if there is none."""
    found: object = described
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
