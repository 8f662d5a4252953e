"""Masks with a budget: at most a share of all masked weights of a model is dropped, in whichever layers they are."""
