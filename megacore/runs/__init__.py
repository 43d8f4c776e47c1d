"""The directory of a run: its settings, versions and metrics, and the report on one or several runs.

Start with ``directory`` for the files, and with ``report`` for the page that is made of them.
"""

from megacore.runs.directory import RunDirectory
from megacore.runs.metrics_file import MetricsFile, RunMetrics, Series, read_metrics
from megacore.runs.report import report

__all__ = ["MetricsFile", "RunDirectory", "RunMetrics", "Series", "read_metrics", "report"]
