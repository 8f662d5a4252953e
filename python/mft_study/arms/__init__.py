"""The kinds of arms. Each is a class with its keys, its training, its models and their bytes; kinds.py lists all."""
