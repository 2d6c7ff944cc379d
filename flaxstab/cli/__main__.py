"""``python -m flaxstab.cli``: the command line of one particular Python."""

import sys

from flaxstab.cli._main import main

if __name__ == "__main__":
    sys.exit(main())
