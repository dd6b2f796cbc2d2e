"""Commands that change something: each says what it did. Each one's module is loaded when it is called."""

from __future__ import annotations
