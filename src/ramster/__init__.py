"""RAMster: machines pool their RAM.

`ramster.empty(shape, dtype, resident=...)` gives a numpy array that may be larger than the RAM it uses. What is
named here is the public interface; it is loaded on first use, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramster.errors import (
        CertificateError,
        ConfigError,
        ForkedError,
        KernelUnsupported,
        NodeUnreachable,
        PageLost,
        PermissionMissing,
        PortTaken,
        ProtocolError,
        RamsterError,
        Refused,
        RegionBusy,
        RegionFull,
        RegionLost,
        StoreFull,
        UsageError,
    )
    from ramster.frontswap.regions import (
        Client,
        Pin,
        Region,
        RegionStatistics,
        attach,
        connect,
        empty,
        region_of,
        zeros,
    )

__all__ = [
    "CertificateError",
    "Client",
    "ConfigError",
    "ForkedError",
    "KernelUnsupported",
    "NodeUnreachable",
    "PageLost",
    "PermissionMissing",
    "Pin",
    "PortTaken",
    "ProtocolError",
    "RamsterError",
    "Refused",
    "Region",
    "RegionBusy",
    "RegionFull",
    "RegionLost",
    "RegionStatistics",
    "StoreFull",
    "UsageError",
    "attach",
    "connect",
    "empty",
    "region_of",
    "zeros",
]

_REGIONS = {"Client", "Pin", "Region", "RegionStatistics", "attach", "connect", "empty", "region_of", "zeros"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("ramster.frontswap.regions" if name in _REGIONS else "ramster.errors"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
