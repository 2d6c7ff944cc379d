"""CIFAR-10: the 6,000 images that ship with the repository, or the whole set from a folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

SMALL = Path(__file__).parent / "data" / "cifar10_small.npz"
MEAN = np.array([0.4914, 0.4822, 0.4465])  # of the whole training set, channels R, G, B
STD = np.array([0.2470, 0.2435, 0.2616])
RECORD = 1 + 3 * 32 * 32  # one label byte, then the planes R, G, B
RECORDS = 10_000  # in each file of the binary version
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"


class DataError(ValueError):
    """Data that is missing or not what it should be; the message is for the user."""


class Cifar10(NamedTuple):
    """Images (N, 32, 32, 3) and labels (N,); images as bytes, or as normalised numbers."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def normalized(self, dtype: np.dtype) -> "Cifar10":
        """Returns the images with the training set's mean and standard deviation taken out."""
        images = (
            ((array / 255 - MEAN) / STD).astype(dtype)
            for array in (self.train_images, self.test_images)
        )
        train, test = images
        labels = (a.astype(np.int32) for a in (self.train_labels, self.test_labels))
        return Cifar10(train, next(labels), test, next(labels))


def load_small() -> Cifar10:
    """Loads the images that ship with the repository: 5,000 to train on, 1,000 to test."""
    with np.load(SMALL, allow_pickle=False) as file:
        return Cifar10(*(file[name] for name in Cifar10._fields))


def load_binary(folder: Path) -> Cifar10:
    """Loads the official binary version from a folder with its six ``.bin`` files.

    Raises:
      DataError: if a file is missing, has another size than it should, or holds no such labels.
    """
    if not folder.is_dir():
        raise DataError(f"--data must be a folder, got {folder}")
    train = [_read(folder / name) for name in TRAIN_FILES]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Cifar10(images, labels, *_read(folder / TEST_FILE))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        wanted = f"{TRAIN_FILES[0]} … {TRAIN_FILES[-1]} and {TEST_FILE}"
        raise DataError(f"{path} is missing: --data needs CIFAR-10's binary version, {wanted}")
    size, expected = path.stat().st_size, RECORD * RECORDS
    if size != expected:
        raise DataError(f"{path} has {size} bytes and should have {expected}: download it again")
    records = np.fromfile(path, np.uint8).reshape(RECORDS, RECORD)
    labels, pixels = records[:, 0], records[:, 1:]
    if labels.max() > 9:
        raise DataError(f"{path} holds the label {labels.max()}: it is not CIFAR-10")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
