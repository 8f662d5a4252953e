"""Read the code that Triton makes of a kernel, for any target and without a device.

ahead.py compiles, sass.py and amdgcn.py count what came out and find its main loops, hazard.py looks for one bug.
"""
