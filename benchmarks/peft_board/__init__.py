"""Our method as an entry of PEFT's method comparison: python -m benchmarks.peft_board."""
