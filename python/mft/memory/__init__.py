"""Estimates of the memory and time of a training step, from shapes alone, without torch."""
