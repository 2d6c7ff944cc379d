"""What the examples' command lines share: errors in one line, numbers, new folders."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
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


def make_folder(parser: Parser, path: Path) -> Path:
    """Creates an output folder, or exits with one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output must be a folder that can be made, got {path}: {error.strerror}")
    return path


class Interrupt:
    """Turns Ctrl-C into a question that the training loop asks between two steps.

    Python may raise ``KeyboardInterrupt`` where nobody hears it, in a callback of the compiler
    say. A second Ctrl-C raises it at once. Use as a context manager, in the main thread.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *_: object) -> None:
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
