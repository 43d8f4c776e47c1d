"""The native checkpoint format: written whole or not at all, read slice by slice, cut for any tp × pp.

Start with ``manifest.py``, which describes a checkpoint, and ``reading.py``, which opens one. ``matrix.py`` is what
converting, splitting, loading and exporting share: matrices that are read block by block.
"""

from megacore.checkpoint.inspection import inspect as inspect
from megacore.checkpoint.layout import Layout as Layout
from megacore.checkpoint.manifest import (
    Manifest as Manifest,
    ModelDescription as ModelDescription,
    build_manifest as build_manifest,
    history_entry as history_entry,
    read_manifest as read_manifest,
)
from megacore.checkpoint.reading import Checkpoint as Checkpoint
from megacore.checkpoint.splitting import split as split
from megacore.checkpoint.writing import Parameter as Parameter, write_checkpoint as write_checkpoint
