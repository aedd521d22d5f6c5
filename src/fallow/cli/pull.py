"""The bar's former place."""

from fallow.cli.bar import Bar

__all__ = ["Bar"]
