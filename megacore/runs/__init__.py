"""The directory of a run: its settings, versions and metrics, and the report on one or several runs.

Start with ``directory`` for the files, and with ``report`` for the page that is made of them.
"""

from megacore.runs.directory import RunDirectory as RunDirectory
from megacore.runs.metrics_file import (
    MetricsFile as MetricsFile,
    RunMetrics as RunMetrics,
    Series as Series,
    read_metrics as read_metrics,
)
from megacore.runs.report import report as report
