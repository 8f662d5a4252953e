"""The rows that are being answered: one batch, one cache, one thread."""
