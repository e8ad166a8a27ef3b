"""Stockpot: a cache-first runtime for large language models."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("stockpot")
