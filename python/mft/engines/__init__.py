"""One optimiser step, in four ways."""
