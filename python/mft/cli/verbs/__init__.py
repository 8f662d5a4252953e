"""The verbs of mft with their options, one file per group of `mft --help`."""
