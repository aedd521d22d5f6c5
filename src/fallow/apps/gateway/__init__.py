"""The gateway: callers' HTTP on one side, the broker on the other."""
