"""The honest comparison: declared arms on the same data, seeds and budget, selected on validation, reported on test."""
