"""python -m mft: the same as the command mft."""

from mft.cli.command import main

main()
