"""Commands about the recipe itself. Each one's module is loaded when it is called."""

from __future__ import annotations
