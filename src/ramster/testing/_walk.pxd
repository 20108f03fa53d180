"""Nothing of the walk extension is for other extensions."""
