"""Training: the run file, the loop, the optimizer, and saving what was trained."""

from megacore.training.batches import Batch, batches
from megacore.training.config.run_config import RunConfig, read_run_config
from megacore.training.engine import Engine
from megacore.training.evaluation.evaluate import evaluate
from megacore.training.evaluation.evaluator import Evaluation
from megacore.training.step_metrics import Step
from megacore.training.trainer import train

__all__ = ["Batch", "Engine", "Evaluation", "RunConfig", "Step", "batches", "evaluate", "read_run_config", "train"]
