"""The version of both packages: pyproject.toml reads it here, and so does a checkout that is not installed."""

__version__ = "0.2.0"
