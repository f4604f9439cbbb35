"""The version, here alone: pyproject.toml and the files that ``save`` writes take it from this line."""

__version__ = "0.1.0"
