"""Reads what an assembler made: instructions, loops, and one bug of theirs."""
