"""Sparse attention for vLLM, chosen per request."""

__version__ = "0.1.0"
