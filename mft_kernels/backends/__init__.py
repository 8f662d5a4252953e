"""The implementations of the ops, one package per backend, and the table that chooses between them (table.py)."""

from .table import OPERANDS, Backend, backend_report, choose, register, registered

__all__ = ["OPERANDS", "Backend", "backend_report", "choose", "register", "registered"]
