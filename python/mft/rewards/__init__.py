"""Training by rewards: sample answers, verify them, and make the right ones likelier."""
