"""Build the two compiled libraries for setup.py. Part of the sources, not of the installed package."""
