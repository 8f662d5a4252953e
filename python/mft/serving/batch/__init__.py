"""Answer the running requests as rows of one batch, with one cache and one thread."""
