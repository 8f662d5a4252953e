"""Training by rewards: sample answers, verify them, and make the correct ones more likely."""
