"""The current mask of a matrix of scores: selected once per change of the scores, or held."""
