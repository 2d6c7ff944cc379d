"""Records what cases give in an environment, to be compared with another one's."""

from flaxstab.parity._record._baseline import Baseline as Baseline
from flaxstab.parity._record._baseline import Record as Record
from flaxstab.parity._record._baseline import read_baseline as read_baseline
from flaxstab.parity._record._baseline import write_baseline as write_baseline
from flaxstab.parity._record._recording import record as record
from flaxstab.parity._record._recording import record_suite as record_suite
from flaxstab.parity._record._recording import surroundings as surroundings
from flaxstab.parity._record._subject import Subject as Subject
