"""Several pages by one request: see _together.pyx."""
