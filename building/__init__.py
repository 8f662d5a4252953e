"""What setup.py runs: how the two compiled libraries are made. Part of the sources, not of the installed package."""
