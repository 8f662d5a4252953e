"""The recipe on a real model in minutes."""
