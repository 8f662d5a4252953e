"""GGUF files with a mask in them: dropped weights become exact zeros in the file's own codes, and come back."""
