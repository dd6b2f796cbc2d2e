"""``log:`` of a recipe as a pydantic model."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from sm_tiered.errors import ConfigError
from sm_tiered.recipe_fields import parse_size, shown
from sm_tiered.recipe_policies import Directory, Flag, Section, Size, Whole
from sm_tiered.settings import LogSettings

__all__ = ["LogSection"]

_LEAST_BYTES = 4096


class LogSection(Section):
    """Where log lines go besides the handlers that the application has."""

    hints = {
        "file": "Write path: ./logs, a directory: each rank has a file of its own there.",
        "directory": "Write path: ./logs.",
        "backups": "Write kept: 4, the number of old files that stay.",
    }

    console: Flag = False
    path: Directory | None = None
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    max_size: Size = "16MiB"
    kept: Whole = 4

    @field_validator("max_size")
    @classmethod
    def _max_size_range(cls, value: str) -> str:
        if parse_size(value) < _LEAST_BYTES:
            raise ConfigError(f"must be 4KiB or more, got {shown(value)}", hint="16MiB is a good one.")
        return value

    @field_validator("kept")
    @classmethod
    def _kept_range(cls, value: int) -> int:
        if not 1 <= value <= 1000:
            raise ConfigError(f"must be 1 to 1000, got {value}", hint="So many old files of each rank stay.")
        return value

    @model_validator(mode="after")
    def _asks_for_something(self) -> LogSection:
        if not self.console and self.path is None:
            raise ConfigError("asks for nothing", hint="Write console: true, path: ./logs or both.")
        return self

    def settings(self) -> LogSettings:
        """What this stands for."""
        return LogSettings(
            console=self.console,
            path=self.path,
            level=self.level,
            max_bytes=parse_size(self.max_size),
            kept=self.kept,
        )
