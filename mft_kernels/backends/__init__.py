"""The implementations of the ops, one package per backend, and the table that chooses between them (table.py)."""

from .table import Backend, backend_report, choose, register, registered

__all__ = ["Backend", "backend_report", "choose", "register", "registered"]
