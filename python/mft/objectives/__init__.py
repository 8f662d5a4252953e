"""What training makes smaller: losses of the next tokens, a chunk of logits at a time."""
