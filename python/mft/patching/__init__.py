"""Write masks into GGUF files: dropped weights become exact zeros in the file's own codes, and can be restored."""
