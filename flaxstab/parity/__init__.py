"""The harness: one way to compare JAX with PyTorch, one way to judge."""

from flaxstab.parity._compare import Report as Report
from flaxstab.parity._compare import compare as compare
from flaxstab.parity._distance import Distance as Distance
from flaxstab.parity._distance import adam_distance as adam_distance
from flaxstab.parity._distance import distance as distance
from flaxstab.parity._distance import model_distances as model_distances
from flaxstab.parity._magnitude import magnitude as magnitude
from flaxstab.parity._magnitude import sensitivity as sensitivity
from flaxstab.parity._replay import replayed_dropout as replayed_dropout
from flaxstab.parity._verdict import Finding as Finding
from flaxstab.parity._verdict import Verdict as Verdict
