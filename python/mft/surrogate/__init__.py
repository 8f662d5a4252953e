"""The surrogate gradient of a mask's scores: near the threshold they learn most, and deletions have a price."""
