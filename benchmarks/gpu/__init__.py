"""`make gpu`: check the Triton and CUDA kernels on this GPU and measure their cost, in less than 9 minutes per command.

__main__.py   the command: starts the process that measures, and another one if a kernel takes that process down
worker.py     that process: runs cases, the most wanted first, while time is left
cases.py      what a case is, its competitors, and the order
results.py    gpu-<what>.json: each case is in the file before, while and after it runs
report.py     gpu.md: failures first, then all figures; also faster_table.py, which "auto" reads

correctness.py   ops on real shapes, equality.py bit for bit; layouts.py: CUDA's on small and odd shapes
programs.py      programs that run in their own process: Triton's tests, compute-sanitizer
timing.py        competitors on rotated inputs (operands.py), in CUDA graphs, in interleaved rounds
ways.py, products.py   a layer's products in every way
choices.py   the way that ran, the one that the model of the card would take, the regret, and goals
once_a_step.py, codes.py, many.py, experts.py   other ops
train.py         whole optimiser steps (../training_steps.py), compared with the figures of mft estimate

bundle.py     everything needed on another machine, in one folder (`make gpu-bundle`)
device.py     the card, or in a dry run a CPU with Triton's interpreter and, by on_host.py, the emulator of csrc/cuda
"""
