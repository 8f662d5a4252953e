"""Files that appear whole or not at all, and the doors to files that a stranger may have written."""
