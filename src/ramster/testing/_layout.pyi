def frame_layout() -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of the engine's frame header, and offset and size of each of its fields."""

def crc32c(data: bytes) -> int:
    """The checksum of a frame header as the engine computes it."""
