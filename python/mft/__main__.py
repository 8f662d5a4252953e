"""Run python -m mft, which is the same as the command mft."""

from mft.cli.command import main

main()
