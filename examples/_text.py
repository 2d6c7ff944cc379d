"""Plain text as numbers: a vocabulary of characters, two parts, and what counting pairs can do."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

SMALL = Path(__file__).parent / "data" / "shakespeare_small.txt"
IGNORED = -100  # the target that cross_entropy leaves out


class TextError(ValueError):
    """A text that cannot be used; the message is for the user."""


class Text(NamedTuple):
    """A text as numbers.

    Attributes:
      characters: its distinct characters in order; a character's number is its place.
      train: the numbers of the part to train on.
      valid: those of the last tenth.
      digest: what tells this text from another.
    """

    characters: str
    train: np.ndarray
    valid: np.ndarray
    digest: str

    def encoded(self, text: str) -> np.ndarray:
        """Returns the numbers of a text's characters.

        Raises:
          TextError: if this text has not all of them.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise TextError(
                f"the text that the model learns has no {', '.join(map(repr, unknown))}"
            )
        return np.array([self.characters.index(c) for c in text], np.int32)

    def decoded(self, numbers: np.ndarray) -> str:
        """Returns the characters that have these numbers."""
        return "".join(self.characters[i] for i in numbers)

    def words(self) -> set[str]:
        """Returns the words of the part to train on."""
        return set(words(self.decoded(self.train)))


def load_text(path: Path = SMALL) -> Text:
    """Reads a text file in UTF-8; the default ships with the repository.

    Raises:
      TextError: if it cannot be read or is too short.
    """
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"--data must be a text file in UTF-8, got {path}: {error}") from error
    if len(content) < 100:
        raise TextError(f"--data must have 100 characters or more, got {path}: {len(content)}")
    characters = "".join(sorted(set(content)))
    place = {c: i for i, c in enumerate(characters)}
    numbers = np.fromiter((place[c] for c in content), np.int32, len(content))
    cut = len(numbers) - len(numbers) // 10
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Text(characters, numbers[:cut], numbers[cut:], digest)


def words(text: str) -> list[str]:
    """Returns the words of a text, in lower case."""
    return "".join(c if c.isalpha() or c == "'" else " " for c in text.lower()).split()


def windows(numbers: np.ndarray, length: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into windows side by side, so that each character but the first is a target once.

    Args:
      numbers: the text.
      length: characters in a window.
      multiple: what the number of windows must be a multiple of; empty ones fill up.

    Returns:
      Characters and those that follow each, both of shape (windows, length); ``IGNORED`` is no
      target.
    """
    room = -(-(len(numbers) - 1) // (length * multiple)) * length * multiple
    inputs, targets = np.zeros(room, np.int32), np.full(room, IGNORED, np.int32)
    inputs[: len(numbers) - 1], targets[: len(numbers) - 1] = numbers[:-1], numbers[1:]
    return inputs.reshape(-1, length), targets.reshape(-1, length)


def letter_entropy(numbers: np.ndarray) -> float:
    """Returns the least loss, in nats, of any model that knows how often each character comes."""
    counts = np.bincount(numbers[1:])
    return _entropy(counts, counts.sum())


def bigram_entropy(numbers: np.ndarray) -> float:
    """Returns the least loss, in nats, of any model that sees one character and foretells the next.

    It is the entropy of a character given the one before it, by this very text's own counts: a
    model that counts pairs elsewhere has more.
    """
    size = int(numbers.max()) + 1
    pairs = np.bincount(numbers[:-1].astype(np.int64) * size + numbers[1:], minlength=size * size)
    pairs = pairs.reshape(size, size)
    return _entropy(pairs, pairs.sum(1, keepdims=True))


def _entropy(counts: np.ndarray, totals: np.ndarray) -> float:
    """Returns minus the mean of the logarithm of counts over totals."""
    seen = counts > 0
    shares = np.divide(counts, totals, out=np.ones(counts.shape), where=seen)
    return float(-np.sum(counts * np.log(shares)) / counts.sum())
