"""Masks in the weights of a model: its layers are ordinary ones meanwhile."""
