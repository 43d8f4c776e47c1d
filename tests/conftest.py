"""Fixtures that several test modules use."""

from rank_pool import ranks

__all__ = ["ranks"]
