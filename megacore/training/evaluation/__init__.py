"""Evaluation: the command, the evaluator that training uses too, and the metrics."""
