"""What tells the owner gate how the machine is used: processor, memory, power, heat, disk, programs, desktop."""
