"""Train, distil, extend and decode multi-token prediction language models."""

__version__ = "0.1.0"
