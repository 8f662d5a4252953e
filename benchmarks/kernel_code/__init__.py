"""Read the machine code of the kernels, for any target and without a device.

ahead.py compiles what Triton would launch, cuda_object.py takes what nvcc has built apart, and cuda_launches.py finds
how that would be launched; sass.py and amdgcn.py count instructions and find the main loops, hazard.py looks for one
bug. report.py (Triton) and cuda.py (CUDA C++) judge, __main__.py writes both tables.
"""
