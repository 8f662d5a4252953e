"""A model hub on loopback for huggingface_hub's own client: the real hub's routes, with repositories in memory."""
