"""Commands that tell a run's story from its events. Each one's module is loaded when it is called."""

from __future__ import annotations
