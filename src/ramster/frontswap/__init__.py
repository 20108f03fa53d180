"""Ways in for memory that does not fit: regions, arrays larger than their RAM."""
