"""Federated learning in which clients send at most 1 bit per weight: the messages, and how a server aggregates them."""
