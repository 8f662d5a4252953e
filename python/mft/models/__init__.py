"""Hugging Face models: loaded, saved, looked into."""
