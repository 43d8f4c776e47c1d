"""The run file: its sections, how it is read, and every mistake in it.

``run_config.py`` puts the sections together and reads the file; each other module holds the sections of one subject.
"""

from megacore.training.config.compute import (
    DropoutSection as DropoutSection,
    KernelsSection as KernelsSection,
    LossScaleSection as LossScaleSection,
    ModelSection as ModelSection,
    ParallelSection as ParallelSection,
    RecomputeSection as RecomputeSection,
)
from megacore.training.config.data import DataSection as DataSection, WeightedDataset as WeightedDataset
from megacore.training.config.optimizer import OptimizerSection as OptimizerSection
from megacore.training.config.output import (
    CheckpointsSection as CheckpointsSection,
    EvaluationSection as EvaluationSection,
    FaultsSection as FaultsSection,
    LoggingSection as LoggingSection,
    OutputSection as OutputSection,
)
from megacore.training.config.run_config import (
    RunConfig as RunConfig,
    explicit_tables as explicit_tables,
    read_run_config as read_run_config,
)
from megacore.training.config.section import Section as Section
from megacore.training.config.training import BatchSizes as BatchSizes, TrainingSection as TrainingSection
