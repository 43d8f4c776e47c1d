"""Training: the run file, the loop, the optimizer, and saving what was trained."""

from megacore.training.loop import Step, accumulate_gradients, train
from megacore.training.run_config import RunConfig, read_run_config

__all__ = ["RunConfig", "Step", "accumulate_gradients", "read_run_config", "train"]
