"""Programs that do the work, each in a process of its own, on a private socket."""
