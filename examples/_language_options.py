"""The character model's command line, and the settings that it gives."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from _cli import LARGEST_SEED, Parser, whole
from _language import Settings
from _text import Text, TextError


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Returns a reader of finite numbers from ``low`` to ``high``."""
    range_ = f"at least {low}" if high == math.inf else f"from {low} to {high}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a number {range_}, got {text}")
        return value

    return read


SEED = whole(0, LARGEST_SEED)
GROUPS = {
    "the model": (
        ("width", whole(1), Settings.width, "features of a character"),
        ("depth", whole(1), Settings.depth, "blocks"),
        ("heads", whole(1), Settings.heads, "heads of each attention"),
        ("context", whole(1), Settings.context, "characters that it sees"),
        ("dropout", number(0, 1), Settings.dropout, "probability of dropping"),
    ),
    "how long": (
        ("steps", whole(1), Settings.steps, "training steps"),
        ("batch-size", whole(1), Settings.batch_size, "windows of text per step"),
        ("learning-rate", number(0), Settings.learning_rate, "its peak"),
        ("checkpoint-every", whole(1), 250, "steps between two checkpoints"),
    ),
    "the sample at the end": (
        ("prompt", str, "Ham.\n", "what it goes on from"),
        ("temperature", number(0), 0.8, "0 always takes the likeliest"),
        ("sample-length", whole(1), 600, "characters"),
        ("sample-seed", SEED, 0, "of the draws"),
    ),
    "where from and where to": (
        ("data", Path, None, "plain text in UTF-8 (default: eight plays in the repository)"),
        ("output", Path, None, "new folder for what is written (default: runs/char_lm-TIME)"),
        ("resume", Path, None, "go on in an earlier run's folder, with its settings"),
        ("seed", SEED, Settings.seed, "of weights, batches and dropout"),
    ),
}
"""Each option's name, reader, default and meaning."""


def parse(arguments: Sequence[str], about: str) -> argparse.Namespace:
    """Reads the command line of a program that is about something."""
    parser = Parser(prog="char_lm.py", description=about)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, read, default, meaning in options:
            what = meaning if default is None else f"{meaning} (default: {str(default).strip()})"
            metavar = {str: "TEXT", Path: "PATH"}.get(read, "N")
            group.add_argument(f"--{name}", type=read, default=default, metavar=metavar, help=what)
    group = parser.add_argument_group("how it computes")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default=Settings.dtype,
        help="bfloat16 computes in it and keeps parameters in float32 (default: float32)",
    )  # fmt: skip
    group.add_argument("--scan", action="store_true", help="run the blocks by one loop")
    group.add_argument("--remat", action="store_true", help="keep less for the backward pass")
    options = parser.parse_args(arguments)
    if options.resume and options.output:
        parser.error("--output must be left out with --resume: a run goes on in its own folder")
    return options


def settings_of(options: argparse.Namespace, text: Text) -> Settings:
    """Returns the settings that options and text give.

    Raises:
      ValueError: if they do not fit.
    """
    if options.width % options.heads:
        raise ValueError(f"--heads must divide --width, got {options.heads} and {options.width}")
    if options.context >= len(text.valid):
        raise TextError(
            f"--context must be below a tenth of the text, {len(text.valid)}, got {options.context}"
        )
    if not options.prompt:
        raise TextError("--prompt must have a character or more")
    text.encoded(options.prompt)
    chosen = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name in options}
    return Settings(text=text.digest, characters=len(text.characters), **chosen)


def as_arguments(saved: Mapping[str, object]) -> list[str]:
    """Returns the options that give saved settings; they are read as a user's are."""
    known = {name.replace("-", "_") for group in GROUPS.values() for name, *_ in group}
    flags = [f"--{name}" for name in ("scan", "remat") if saved.get(name) is True]
    given = (f for f in fields(Settings) if f.name in known | {"dtype"} and f.name in saved)
    return [*flags, *(f"--{f.name.replace('_', '-')}={saved[f.name]}" for f in given)]
