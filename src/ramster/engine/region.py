"""A region's documented face: `Region` serves one application's faults; its contract is in `_region.pyi`."""

from ramster.engine._region import Region

__all__ = ["Region"]
