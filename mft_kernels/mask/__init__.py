"""What the mask of a matrix of scores is now: selected once per change of the scores, or held."""
