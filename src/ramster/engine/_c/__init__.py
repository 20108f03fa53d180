"""C declarations for the native modules; nothing to import at run time."""
