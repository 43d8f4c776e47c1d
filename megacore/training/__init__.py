"""Training and evaluation of a model as a run file describes them.

Start reading at ``trainer.py``, which holds the loop; ``resolved.py`` computes everything that the loop works with, and
``engine.py`` takes one optimizer step. ``config`` is the run file, section by section.
"""

from megacore.training.batches import Batch as Batch, batches as batches
from megacore.training.config import RunConfig as RunConfig, read_run_config as read_run_config
from megacore.training.engine import Engine as Engine
from megacore.training.evaluation.evaluate import evaluate as evaluate
from megacore.training.step_metrics import Evaluation as Evaluation, Step as Step, TrainResult as TrainResult
from megacore.training.trainer import train as train
