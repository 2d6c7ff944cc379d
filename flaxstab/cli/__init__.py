"""The command line: ``flaxstab COMMAND``; one private module for each command."""

from flaxstab.cli._main import main as main
