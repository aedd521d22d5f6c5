"""The hub: the meeting point."""
