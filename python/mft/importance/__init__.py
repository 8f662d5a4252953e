"""Importance of each weight, from the weight itself or from data, and scores that start from it."""
