"""Measures the chain from the outside: a stub engine, a load generator, peers to compare with and a report."""
