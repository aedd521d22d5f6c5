"""The right machine for each call: filter, predict, price, pick, explain. Open decide.py first."""
