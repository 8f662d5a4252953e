"""How much each weight matters, by the weight itself or by data; scores that begin there."""
