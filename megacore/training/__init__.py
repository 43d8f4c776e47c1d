"""Training and evaluation of a model as a run file describes them.

Start reading at ``trainer.py``, which holds the loop; ``resolved.py`` computes everything that the loop works with, and
``engine.py`` takes one optimizer step. ``config`` is the run file, section by section.
"""

from megacore.training.batches import Batch, batches
from megacore.training.config import RunConfig, read_run_config
from megacore.training.engine import Engine
from megacore.training.evaluation.evaluate import evaluate
from megacore.training.step_metrics import Evaluation, Step, TrainResult
from megacore.training.trainer import train

__all__ = [
    "Batch",
    "Engine",
    "Evaluation",
    "RunConfig",
    "Step",
    "TrainResult",
    "batches",
    "evaluate",
    "read_run_config",
    "train",
]
