"""`make gpu`: whether the Triton and CUDA kernels are right on this GPU, and what they cost; a command under 9 minutes.

__main__.py   the command: starts the process that measures, and another where a kernel has taken it down
worker.py     that process: runs cases, most wanted first, as long as the time lasts
cases.py      what a case is, who takes part in it, and the order
results.py    gpu-<what>.json: each case is there before, while and after it runs
report.py     gpu.md: what failed first, then goals (goals.py) and all figures; and faster_table.py, which "auto" reads

correctness.py   ops on real shapes, equality.py bit for bit; layouts.py: CUDA's on small and odd shapes
programs.py      what runs in a process of its own: Triton's tests, compute-sanitizer
timing.py        competitors on rotated inputs (operands.py), in CUDA graphs, in interleaved rounds
forms.py         whether what is timed came from the binary and form that the record names
ways.py, products.py, two_passes.py   a layer's products in every way
once_a_step.py, codes.py, many.py, experts.py   other ops
train.py         whole optimiser steps, compared with what mft estimate says

bundle.py     what it needs elsewhere, in one folder (`make gpu-bundle`)
device.py     the card, or in a dry run a CPU with Triton's interpreter and, by on_host.py, the emulator of csrc/cuda
"""
