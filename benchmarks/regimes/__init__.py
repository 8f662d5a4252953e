"""Federated masks, to copy: the messages of a client, and how a server aggregates them (docs/how-to/federated.md)."""
