"""One step per schema that ever landed, oldest first. A step never changes once it has landed, and there is no way back but a backup."""
