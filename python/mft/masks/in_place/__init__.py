"""Masks in the weights of a model, whose masked layers are ordinary ones meanwhile."""
