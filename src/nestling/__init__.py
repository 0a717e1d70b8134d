"""Nestling raises a ChatGPT: raw text to an aligned chat model. The folders below, in order, are the road."""

__version__ = "0.1.0"
