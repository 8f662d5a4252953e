"""Measure what kernels and training steps cost, one file per question (make bench): docs/reference/benchmarks.md."""
