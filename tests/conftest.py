"""Fixtures that several test modules use."""

from megacore.testing.ranks import ranks

__all__ = ["ranks"]
