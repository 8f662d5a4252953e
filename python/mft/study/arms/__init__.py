"""What each kind of arm does: from its start to a trained model, seen by validation, and later by test."""
