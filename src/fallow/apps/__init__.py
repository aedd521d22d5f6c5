"""The processes: load, decide, save, acknowledge. They hold no rule of the network."""
