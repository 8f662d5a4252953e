"""Ways of training masks against a tuned control, on validation."""
