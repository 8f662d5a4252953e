"""Files that are written whole or not at all, and safe readers for files from untrusted sources."""
