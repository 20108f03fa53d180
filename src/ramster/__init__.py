"""RAMster: machines pool their RAM.

`ramster.empty(shape, dtype, resident=...)` gives a numpy array that may be larger than the RAM it uses. What is
named here is the public interface; it is loaded on first use, so that importing the package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from ramster.errors import (
        CertificateError,
        ConfigError,
        ForkedError,
        KernelUnsupported,
        LimitReached,
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
        ToolMissing,
        UntrustedNode,
        UsageError,
    )
    from ramster.frontswap.capacity import Capacity, CapacityWarning
    from ramster.frontswap.npy import load, save
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
    "Capacity",
    "CapacityWarning",
    "CertificateError",
    "Client",
    "ConfigError",
    "ForkedError",
    "KernelUnsupported",
    "LimitReached",
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
    "ToolMissing",
    "UntrustedNode",
    "UsageError",
    "attach",
    "connect",
    "empty",
    "load",
    "region_of",
    "save",
    "zeros",
]

_FROM = {
    **dict.fromkeys(("Capacity", "CapacityWarning"), "ramster.frontswap.capacity"),
    **dict.fromkeys(("load", "save"), "ramster.frontswap.npy"),
    **dict.fromkeys(
        ("Client", "Pin", "Region", "RegionStatistics", "attach", "connect", "empty", "region_of", "zeros"),
        "ramster.frontswap.regions",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version(__name__)
    elif name in __all__:
        value = getattr(import_module(_FROM.get(name, "ramster.errors")), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
