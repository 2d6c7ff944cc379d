"""Where this runs: versions, settings, devices; what is known to go wrong there.

Nothing here imports a framework before it is asked for devices, and no failure of one is raised.
"""

from flaxstab._environment._describe import describe as describe
from flaxstab._environment._describe import packages as packages
from flaxstab._environment._describe import tracked as tracked
from flaxstab._environment._findings import Finding as Finding
from flaxstab._environment._findings import findings as findings
from flaxstab._environment._findings import pair_findings as pair_findings
from flaxstab._environment._isolated import Ended as Ended
from flaxstab._environment._isolated import InstallError as InstallError
from flaxstab._environment._isolated import build as build
from flaxstab._environment._isolated import installed as installed
from flaxstab._environment._known import BAD_PAIRS as BAD_PAIRS
from flaxstab._environment._known import INCIDENTS as INCIDENTS
from flaxstab._environment._known import Incident as Incident
from flaxstab._environment._known import ahead as ahead
from flaxstab._environment._known import bad_pairs as bad_pairs
from flaxstab._environment._known import incidents as incidents
from flaxstab._environment._known import standing as standing
from flaxstab._environment._versions import normal as normal
from flaxstab._environment._versions import order as order
from flaxstab._environment._versions import parse_pins as parse_pins
