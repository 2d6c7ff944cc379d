"""The harness: one way to compare JAX with PyTorch, one way to judge."""

from flaxstab.parity._compare import compare as compare
from flaxstab.parity._distance import Distance as Distance
from flaxstab.parity._distance import adam_distance as adam_distance
from flaxstab.parity._distance import distance as distance
from flaxstab.parity._distance import model_distances as model_distances
from flaxstab.parity._evidence import Budget as Budget
from flaxstab.parity._evidence import Evidence as Evidence
from flaxstab.parity._layers import LayerError as LayerError
from flaxstab.parity._layers import Location as Location
from flaxstab.parity._locate import locate as locate
from flaxstab.parity._magnitude import magnitude as magnitude
from flaxstab.parity._magnitude import sensitivity as sensitivity
from flaxstab.parity._program import Linen as Linen
from flaxstab.parity._replay import register_replay as register_replay
from flaxstab.parity._replay import replayed as replayed
from flaxstab.parity._report import Departure as Departure
from flaxstab.parity._report import Report as Report
from flaxstab.parity._report import Tolerance as Tolerance
from flaxstab.parity._statistics import HasCdf as HasCdf
from flaxstab.parity._statistics import HasMean as HasMean
from flaxstab.parity._statistics import IsNormal as IsNormal
from flaxstab.parity._statistics import SameLaw as SameLaw
from flaxstab.parity._steps import TrainStep as TrainStep
from flaxstab.parity._steps import trajectory as trajectory
from flaxstab.parity._verdict import Finding as Finding
from flaxstab.parity._verdict import Verdict as Verdict
