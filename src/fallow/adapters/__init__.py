"""One outside thing per file, and no rules."""
