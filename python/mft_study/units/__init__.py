"""What a unit does: train a model from its start, evaluate it on validation, and later on test."""
