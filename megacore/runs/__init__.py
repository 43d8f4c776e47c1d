"""The directory of a run: what is kept of it, reading that again, and the report on one or several runs."""

from megacore.runs.directory import RunDirectory
from megacore.runs.metrics_file import Metrics, MetricsFile, Series, read_metrics
from megacore.runs.report import report

__all__ = ["Metrics", "MetricsFile", "RunDirectory", "Series", "read_metrics", "report"]
