"""Training objectives: losses of the next tokens, computed one chunk of logits at a time."""
