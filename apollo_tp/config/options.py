"""How an option is declared and checked."""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import Any

from apollo_tp.errors import ConfigError


def option(default: Any, help_text: str) -> Any:
    """A dataclass field with its ``--help`` line. A callable default is a factory."""
    metadata = {"help": help_text}
    if callable(default) and not isinstance(default, Enum):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise ConfigError naming the option unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{name}: got {got!r}, expected {expected}")
