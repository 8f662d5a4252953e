"""Read the machine code of the kernels, for any target and without a device.

building/ahead.py compiles what Triton would launch (launches.py). building/machine_code/ counts instructions, finds
the main loops, and looks for one bug. report.py (Triton) and cuda.py (the objects that nvcc has built) find faults;
__main__.py writes the table of both.
"""
