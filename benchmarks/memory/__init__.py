"""How much memory whole training steps take: estimated, simulated on fake tensors, and measured."""
