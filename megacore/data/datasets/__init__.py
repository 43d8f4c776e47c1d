"""Datasets on disk: token ids, instruction data, descriptions, merging and splits.

Start with ``indexed``: all datasets are made of its ``.bin`` and ``.idx`` files.
"""
