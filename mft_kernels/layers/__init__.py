"""Modules with scores: MaskedLinear and its kin, and what can be masked at all."""
