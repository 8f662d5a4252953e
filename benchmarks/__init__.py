"""What kernels and training steps cost, one file a question: `make bench` answers all; see docs/benchmarks.md."""
