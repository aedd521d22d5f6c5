"""A replay on a virtual clock that drives the real matcher. Its world shares no code with the predictor. Open run.py first."""
