"""Thin commands. What they need is imported when they run, so that `fallow --help` is quick."""
