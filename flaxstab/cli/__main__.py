"""``python -m flaxstab.cli``: the command line of one particular Python."""

import sys

from flaxstab.cli._main import main

sys.exit(main())
