"""The version, read by setup.py and the package alike."""

__version__ = "0.1.0"
