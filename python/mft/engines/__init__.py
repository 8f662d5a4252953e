"""One optimiser step, in five ways."""
