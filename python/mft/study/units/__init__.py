"""What a unit does, from its start to a trained model, seen by validation, and later by test."""
