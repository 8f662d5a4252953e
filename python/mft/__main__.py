"""python -m mft: the same as the command mft."""

from mft.cli.app import main

main()
