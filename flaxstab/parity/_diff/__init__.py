"""Says what has moved between two baselines, on which side, and whether it matters."""

from flaxstab.parity._diff._diff import Diff as Diff
from flaxstab.parity._diff._diff import against as against
from flaxstab.parity._diff._diff import diff as diff
from flaxstab.parity._diff._diff import diff_baselines as diff_baselines
from flaxstab.parity._diff._diff import gathered as gathered
from flaxstab.parity._diff._types import CaseDiff as CaseDiff
from flaxstab.parity._diff._types import Effect as Effect
from flaxstab.parity._diff._types import Move as Move
from flaxstab.parity._diff._types import NameDiff as NameDiff
from flaxstab.parity._diff._types import Outcome as Outcome
from flaxstab.parity._diff._types import Square as Square
from flaxstab.parity._diff._types import StreamDiff as StreamDiff
