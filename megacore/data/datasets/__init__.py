"""Datasets on disk: the indexed and the instruction dataset, their description, merging and splits."""
