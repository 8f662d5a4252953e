"""Weights held as NF4 or int8 codes: a matrix, experts in one parameter, and the linear layers that hold a matrix."""
