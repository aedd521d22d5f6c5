"""Bytes to values and back: the only place that distrusts what comes in."""
