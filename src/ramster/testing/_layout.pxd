"""Nothing of the layout extension is for other extensions."""
