"""Read the machine code of the kernels, for any target and without a device.

building/ahead.py compiles what Triton would launch. cuda_object.py reads the objects that nvcc has built, and
cuda_launches.py finds how their kernels would be launched. building/machine_code/ counts instructions, finds the
main loops, and looks for one bug. report.py (Triton) and cuda.py (CUDA C++) find faults; __main__.py writes both
tables.
"""
