"""The run file: its sections, how it is read, and every mistake in it.

``run_config.py`` puts the sections together and reads the file; each other module holds the sections of one subject.
"""

from megacore.training.config.compute import (
    DropoutSection,
    KernelsSection,
    LossScaleSection,
    ModelSection,
    ParallelSection,
    RecomputeSection,
)
from megacore.training.config.data import DataSection, WeightedDataset
from megacore.training.config.optimizer import OptimizerSection
from megacore.training.config.output import (
    CheckpointsSection,
    EvaluationSection,
    FaultsSection,
    LoggingSection,
    OutputSection,
)
from megacore.training.config.run_config import RunConfig, explicit_tables, read_run_config
from megacore.training.config.section import Section
from megacore.training.config.training import BatchSizes, TrainingSection

__all__ = [
    "BatchSizes",
    "CheckpointsSection",
    "DataSection",
    "DropoutSection",
    "EvaluationSection",
    "FaultsSection",
    "KernelsSection",
    "LoggingSection",
    "LossScaleSection",
    "ModelSection",
    "OptimizerSection",
    "OutputSection",
    "ParallelSection",
    "RecomputeSection",
    "RunConfig",
    "Section",
    "TrainingSection",
    "WeightedDataset",
    "explicit_tables",
    "read_run_config",
]
