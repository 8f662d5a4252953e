"""Weights held as codes: a matrix, experts in one parameter, and the linear layers that hold a matrix."""
