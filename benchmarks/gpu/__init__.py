"""`make gpu`: whether the Triton and CUDA kernels are right on this GPU, and what they cost; a command under 9 minutes.

cases.py      what is measured, by whom, in which order
__main__.py   the command; starts and watches a worker, and a new one when a kernel has taken it down
worker.py     runs the cases, most wanted first, as long as the budget lasts
kernels.py    the sets of kernels: Triton's fused, by choice, through scratch; CUDA's
correctness.py  the real shapes; own_tests.py: Triton's tests; layouts.py: CUDA's small and odd shapes
equality.py   every op against the reference, bit for bit
sanitizer.py, sanitized.py   compute-sanitizer over the CUDA kernels
timing.py     CUDA graphs over rotated inputs, in interleaved rounds
competitors.py, two_passes.py, threshold.py, updates.py, codes.py   what is timed; host.py with what the host needs
sweep/        every tile that a kernel could take, and what the choice of plan.py costs
train.py      whole optimiser steps, beside what mft estimate says
goals.py, tables.py   met or not; Markdown from the JSON
faster_table.py  by which "auto" takes the CUDA kernels, once they were correct
bundle.py     what it needs elsewhere, in one folder (`make gpu-bundle`)
device.py     the card, or in a dry run a CPU with Triton's interpreter and, by on_host.py, the emulator of csrc/cuda
"""
