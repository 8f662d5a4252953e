"""A run of many steps: the loop, its checkpoints, its directory."""
