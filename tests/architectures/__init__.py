"""Which models of transformers can be masked: make every architecture small, try it, and write the page of results."""
