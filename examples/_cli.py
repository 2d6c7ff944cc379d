"""What the examples' command lines share: errors in one line, numbers, new folders."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

LARGEST_SEED = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns a reader of whole numbers from ``low`` to ``high``."""
    range_ = f"at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be a whole number {range_}, got {text}")
        return value

    return read


def add_seed(parser: Parser) -> None:
    """Adds the option ``--seed``."""
    parser.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="default: 0"
    )


def add_output(parser: Parser, where: str) -> None:
    """Adds the option ``--output`` of an example that draws a figure."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(where),
        metavar="DIR",
        help="folder for the figure (default: %(default)s)",
    )


def make_folder(parser: Parser, path: Path) -> Path:
    """Creates an output folder, or exits with one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output must be a folder that can be made, got {path}: {error.strerror}")
    return path


@contextmanager
def on_interrupt(handler: Callable[..., object] | signal.Handlers) -> Iterator[None]:
    """Answers Ctrl-C with a handler inside the block; the old one comes back behind it.

    Only the main thread may set handlers: elsewhere the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Interrupt:
    """Turns Ctrl-C into a question that the training loop asks between two steps.

    Python may raise ``KeyboardInterrupt`` where nobody hears it, in a callback of the compiler
    say. A second Ctrl-C raises it at once.
    """

    def __init__(self) -> None:
        self._asked = False

    def ask(self, *_: object) -> None:
        """Remembers Ctrl-C; the handler for :func:`on_interrupt`."""
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises ``KeyboardInterrupt`` if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """Ends the process; after an interruption without waiting for what still runs or compiles.

    XLA's compiler threads do not survive the interpreter's ordinary way out.
    """
    if code != 128 + signal.SIGINT:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
