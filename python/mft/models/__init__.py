"""Load, save and inspect Hugging Face models."""
