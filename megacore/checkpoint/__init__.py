"""The native checkpoint format: written whole or not at all, read slice by slice, cut for any layout."""

from megacore.checkpoint.history import history_entry
from megacore.checkpoint.inspection import inspect
from megacore.checkpoint.layout import Layout
from megacore.checkpoint.manifest import Manifest, read_manifest
from megacore.checkpoint.reading import Checkpoint
from megacore.checkpoint.splitting import split
from megacore.checkpoint.writing import Parameter, write_checkpoint

__all__ = [
    "Checkpoint",
    "Layout",
    "Manifest",
    "Parameter",
    "history_entry",
    "inspect",
    "read_manifest",
    "split",
    "write_checkpoint",
]
