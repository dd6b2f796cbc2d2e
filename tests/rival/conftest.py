"""Fixtures of the tests that run the predecessor."""

from __future__ import annotations

from tests.predecessor import predecessor_server

__all__ = ["predecessor_server"]
