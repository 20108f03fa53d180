"""Nothing of the touch extension is for other extensions."""
