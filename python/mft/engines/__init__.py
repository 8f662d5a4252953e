"""One optimiser step, in six memory modes."""
