"""Training: the run file, the loop, the optimizer, and saving what was trained."""

from megacore.training.batches import Batch, batches
from megacore.training.engine import Engine
from megacore.training.evaluating import evaluate
from megacore.training.evaluation import Evaluation
from megacore.training.loop import train
from megacore.training.run_config import RunConfig, read_run_config
from megacore.training.step import Step

__all__ = ["Batch", "Engine", "Evaluation", "RunConfig", "Step", "batches", "evaluate", "read_run_config", "train"]
