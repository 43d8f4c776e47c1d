"""The native checkpoint format: written whole or not at all, read slice by slice, cut for any tp × pp.

Start with ``manifest.py``, which describes a checkpoint, and ``reading.py``, which opens one. ``matrix.py`` is what
converting, splitting, loading and exporting share: matrices that are read block by block.
"""

from megacore.checkpoint.inspection import inspect
from megacore.checkpoint.layout import Layout
from megacore.checkpoint.manifest import Manifest, ModelDescription, build_manifest, history_entry, read_manifest
from megacore.checkpoint.reading import Checkpoint
from megacore.checkpoint.splitting import split
from megacore.checkpoint.writing import Parameter, write_checkpoint

__all__ = [
    "Checkpoint",
    "Layout",
    "Manifest",
    "ModelDescription",
    "Parameter",
    "build_manifest",
    "history_entry",
    "inspect",
    "read_manifest",
    "split",
    "write_checkpoint",
]
