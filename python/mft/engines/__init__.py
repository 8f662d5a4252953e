"""One optimiser step, in six ways."""
