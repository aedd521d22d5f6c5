"""Fallow pools idle CPUs, and whatever GPUs are there, into one open network for AI work."""

__version__ = "0.1.0"
