"""Configuration: `load(path)` gives a frozen `Config` or a ConfigError; knobs.py declares every knob once."""

from ramster.config.knobs import Address, Config
from ramster.config.load import load

__all__ = ["Address", "Config", "load"]
