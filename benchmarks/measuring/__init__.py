"""What measurements share: processes that take turns, memory, bars, the machine."""
