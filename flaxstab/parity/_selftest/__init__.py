"""The harness tests itself: it must find faults planted in either side, and nothing else."""

from flaxstab.parity._selftest._instances import Instances as Instances
from flaxstab.parity._selftest._instances import run_instances as run_instances
from flaxstab.parity._selftest._page import page as page
from flaxstab.parity._selftest._plant import Fault as Fault
from flaxstab.parity._selftest._plant import Sides as Sides
from flaxstab.parity._selftest._run import FAULTS as FAULTS
from flaxstab.parity._selftest._run import run as run
from flaxstab.parity._selftest._sweep import sound_pairs as sound_pairs
from flaxstab.parity._selftest._sweep import sweep as sweep
from flaxstab.parity._selftest._table import Table as Table
