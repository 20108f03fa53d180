"""What travels between nodes: byte tables, encoding and decoding, and who is let in. No I/O here."""
