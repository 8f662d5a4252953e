"""What a training step needs of memory and time, from shapes alone, without torch."""
