"""Evaluation on the validation and test data, during training and by itself.

Start reading at ``evaluator.py``, which measures a model; ``evaluate.py`` is the command that does so by itself, and
``metrics.py`` holds the metrics.
"""
