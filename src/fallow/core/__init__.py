"""Decisions: plain functions, values in, a value out; no clock, chance, I/O or async."""
