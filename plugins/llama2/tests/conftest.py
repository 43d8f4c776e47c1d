"""Fixtures of these tests: Llama 2 in Meta's own files, and two ranks to run functions on."""

from megacore.testing.ranks import ranks
from meta_files import meta_files

__all__ = ["meta_files", "ranks"]
