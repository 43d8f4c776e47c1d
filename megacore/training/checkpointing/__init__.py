"""Training checkpoints and the final model: the files that a run writes, and that it resumes from.

Start reading at ``manager.py``, which saves and restores a run's checkpoints; ``directory.py``, ``storage.py`` and
``train_state.py`` do its parts. ``final_model.py`` saves the trained weights.
"""
