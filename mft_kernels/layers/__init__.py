"""Modules with scores, such as MaskedLinear, and the rules for which modules can be masked."""
