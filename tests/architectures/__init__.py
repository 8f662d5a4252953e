"""Which models of transformers can be masked: every architecture made small, tried, and written into a page."""
