"""Masks on a model, and on disk."""
