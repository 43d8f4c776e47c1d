"""TensorBoard: event files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from megacore.training.loggers import LoggedRun


class TensorboardLogger:
    """Writes ``DIR/tensorboard``; ``tensorboard --logdir runs`` shows all runs there."""

    def __init__(self, run: LoggedRun) -> None:
        assert run.directory is not None, "checked before the run"
        # TensorBoard drops what an earlier start wrote at this iteration and later.
        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.iteration + 1)

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=iteration)

    def close(self) -> None:
        self._writer.close()
