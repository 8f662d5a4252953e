"""Training runs: the loop, checkpoints, and the run directory."""
