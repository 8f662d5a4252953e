"""`make gpu`: whether the Triton kernels are right on this GPU, and what they cost; one command under 9 minutes.

cases.py      what is measured, by whom, in which order
__main__.py   the command; starts and watches a worker, and a new one when a kernel has taken it down
worker.py     runs the cases, most wanted first, as long as the budget lasts
correctness.py  the tests on this device, then the real shapes
timing.py     CUDA graphs over rotated inputs, in interleaved rounds
competitors.py, two_passes.py, threshold.py   what is timed
goals.py, tables.py   met or not; Markdown from the JSON
device.py     the card, or in a dry run a CPU with Triton's interpreter
"""
