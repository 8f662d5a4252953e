"""Federated learning with at most 1 bit per weight up: what clients send, and what a server makes of it."""
