"""A model hub on loopback for huggingface_hub's own client: the routes of the real one, repositories in memory."""
