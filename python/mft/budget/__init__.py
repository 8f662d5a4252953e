"""Masks with a budget: a share of all masked weights of a model is dropped, in whichever layers they are."""
