"""Masks under a budget: a share of all masked weights of a model is dropped, wherever in it."""
