"""Asynchronous training checkpoints and resume."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.checkpoint import Layout, build_manifest
from megacore.checkpoint.manifest import TOKENIZER_DIRECTORY, ParameterEntry, WeightFile, write_manifest
from megacore.checkpoint.safetensors_file import DTYPE_NAMES
from megacore.checkpoint.training_record import StoredTensor, TrainingRecord
from megacore.checkpoint.writing import copy_tokenizer
from megacore.errors import MegacoreError, OutputError
from megacore.parallel import ParallelContext, broadcast_object, is_lost_connection
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.checkpointing.final_model import ReservedOutput
from megacore.training.checkpointing.storage import PlacedTensor, SafetensorsWriter
from megacore.training.checkpointing.train_state import restore_tensors, state_tensors, write_tensors
from megacore.training.engine import Engine
from megacore.training.resolved import ResolvedRun
from megacore.training.schedule import Progress
from megacore.training.step_guard import StepGuard


class RunCheckpoints:
    """Saves and restores the training checkpoints of a run. All ranks have one, and make the same calls.

    Args:
        resolved: The run.
        engine: The engine whose state is saved.
        guard: The step guard whose state is saved.
        run_id: The identifier of the run, the same on all ranks.
        output: The reserved output, which has the tokenizer's files for as long as the run takes.

    Attributes:
        directory: The directory of the checkpoints.
        num_failed: Number of checkpoints that could not be saved.
        run_id: The identifier of the run.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        engine: Engine,
        guard: StepGuard,
        *,
        run_id: str,
        output: ReservedOutput,
    ) -> None:
        self.directory = CheckpointDirectory(resolved.run.checkpoint_directory)
        self.num_failed = 0
        self._settings = engine.run.checkpoints
        self._engine = engine
        self._parallel = engine.parallel
        self._guard = guard
        self._resolved = resolved
        self.run_id = run_id
        self._output = output
        self._copies: dict[str, Tensor] = {}
        self._saved_iteration: int | None = None
        self._under_way: _Background | None = None
        self._notes: list[str] = []
        self._open = ExitStack()
        self._is_locked = False
        # A group of its own, since training uses the others meanwhile; on the CPU, whatever device training uses.
        self._group = dist.new_group(backend="gloo", timeout=self._parallel.timeout) if self._parallel.mesh else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the directory, and release it when the last checkpoint is written or has failed.

        Without an interval it is created and locked when something is saved.
        """
        with self._open:
            if self._settings.interval is not None:
                self._lock_directory()
            try:
                yield
            except Exception as error:
                # A failure of the run must not lose the steps before it. Ranks that wait for this one write too.
                if self._under_way is not None and not is_lost_connection(error):
                    self._under_way.join()
                raise

    def _lock_directory(self) -> None:
        if self._parallel.rank == 0 and not self._is_locked:
            self._open.enter_context(self.directory.locked())
            self._is_locked = True

    def restore(self) -> None:
        """Restore everything but the weights, which the engine has already, from the checkpoint to resume."""
        checkpoint = self._resolved.checkpoint
        training = checkpoint.manifest.training
        assert training is not None
        same_layout = training.state["sizes"] == asdict(self._parallel.sizes)
        restore_tensors(self._engine, checkpoint, same_layout=same_layout)
        if self._engine.loss_scale is not None and training.state["loss_scale"] is not None:
            self._engine.loss_scale.restore(training.state["loss_scale"])
        self._guard.restore(training.state["guard"])
        if checkpoint.path.parent.resolve() == self.directory.path.resolve():
            self._saved_iteration = training.iteration
            if self._parallel.rank == 0:
                self._lock_directory()
                for path in self.directory.set_aside_after(training.iteration):
                    self._notes.append(f"a checkpoint after iteration {training.iteration} is kept as {path}")

    def is_due(self, iteration: int) -> bool:
        """Return whether the run file asks for a checkpoint after ``iteration``."""
        return self._settings.interval is not None and iteration % self._settings.interval == 0

    def save(self, progress: Progress, *, waits: bool) -> Path:
        """Save a checkpoint and return its path: in the background or, if ``waits``, before the call returns.

        Raises:
            MegacoreError: if ``waits`` and the checkpoint cannot be saved. Otherwise a failure is counted and reported
                by :meth:`notes`.
        """
        self.wait()
        out = self.directory.checkpoint_path(progress.iteration)
        if self._saved_iteration == progress.iteration:
            return out
        self._lock_directory()
        record = TrainingRecord(progress.iteration, progress.num_samples, {}, self._state(progress))
        in_background = self._settings.asynchronous and not waits
        tensors = state_tensors(self._engine)
        if in_background:
            tensors = self._copied(tensors)
        writer = SafetensorsWriter(
            out,
            self._parallel,
            finish=lambda staging, files, stored: self._finish(staging, files, stored, record),
            published=self._published,
            is_alone=not in_background,
        )
        background = _Background(tensors, writer, self._parallel, self._group, progress.iteration)
        if in_background:
            background.start()
            self._under_way = background
        else:
            background.run()
            self._settle(background, raises=waits)
        return out

    def save_last(self, progress: Progress) -> MegacoreError | None:
        """Save the last checkpoint, from which the run can be extended; return the error, if there is one."""
        try:
            self.save(progress, waits=True)
        except MegacoreError as error:
            return error
        except OSError as error:
            return OutputError(f"{self.directory.path}: the last checkpoint cannot be written: {error}")
        return None

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete or has failed."""
        if self._under_way is not None:
            background, self._under_way = self._under_way, None
            background.join()
            self._settle(background, raises=False)

    def notes(self) -> tuple[str, ...]:
        """Return the notes for the user since the last call."""
        background = self._under_way
        if background is not None and not background.is_alive():
            self.wait()
        notes, self._notes = tuple(self._notes), []
        return notes

    def _settle(self, background: _Background, *, raises: bool) -> None:
        error = background.error
        if error is None:
            self._saved_iteration = background.iteration
            return
        if raises or not isinstance(error, MegacoreError | OSError):
            raise error
        self.num_failed += 1
        self._notes.append(
            f"NO CHECKPOINT was saved after iteration {background.iteration}, the {_ordinal(self.num_failed)} that "
            f"failed: {error}. Training continues, and the earlier ones are untouched"
        )

    def _state(self, progress: Progress) -> dict[str, Any]:
        engine = self._engine
        return {
            "run_id": self.run_id,
            "settings": engine.run.settings(),
            "datasets": dict(self._resolved.dataset_digests),
            "sizes": asdict(self._parallel.sizes),
            "loss_scale": None if engine.loss_scale is None else engine.loss_scale.state(),
            "guard": self._guard.state(),
            "evaluated_after": progress.evaluated_after,
            "warmup_iters": progress.warmup_iters,
        }

    def _copied(self, tensors: dict[str, PlacedTensor]) -> dict[str, PlacedTensor]:
        """Copy ``tensors`` to CPU memory that is kept for the next checkpoint: allocating it anew would take longer."""
        copied = {}
        for name, tensor in tensors.items():
            part = tensor.part
            copy = self._copies.get(name)
            if copy is None or copy.shape != part.shape:
                copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self._copies[name] = copy
            copy.copy_(part, non_blocking=True)
            copied[name] = PlacedTensor(tensor.shape, tensor.boxes, copy)
        if self._parallel.device.type == "cuda":
            torch.cuda.synchronize(self._parallel.device)
        return copied

    def _finish(
        self, staging: Path, files: dict[str, WeightFile], stored: dict[str, StoredTensor], record: TrainingRecord
    ) -> None:
        """Complete the checkpoint in ``staging``, on rank 0."""
        source, engine = self._resolved.checkpoint, self._engine
        tokenizer = self._output.staging / TOKENIZER_DIRECTORY
        details = {"iterations": record.iteration, "dtype": engine.run.model.dtype}
        dtype = DTYPE_NAMES[engine.param_dtype]
        manifest = build_manifest(
            source.manifest.description.after_training(source.path, run_id=self.run_id, **details),
            layout=Layout.from_stages(engine.all_stages, tp=self._parallel.tp_size),
            parameters={name: ParameterEntry(self._resolved.specs[name], dtype) for name in source.manifest.parameters},
            files=dict(sorted(files.items())),
            tokenizer=copy_tokenizer({name: tokenizer / name for name in self._output.tokenizer}, staging),
            training=TrainingRecord(record.iteration, record.num_samples, stored, record.state),
        )
        write_manifest(staging, manifest)

    def _published(self) -> None:
        """Update the directory on rank 0 after a checkpoint was published."""
        try:
            self.directory.point_to_latest()
            self.directory.keep(self._settings)
        except OSError as error:
            self._notes.append(f"{self.directory.path} could not be cleaned up: {error.strerror} ({error.filename})")


def resolve_run_id(record: TrainingRecord | None, parallel: ParallelContext) -> str:
    """Return the identifier of the run that resumes from ``record``, or a new one. For all ranks."""
    if record is not None:
        return record.run_id
    return broadcast_object(uuid.uuid4().hex, parallel)


class _Background(threading.Thread):
    """Writes one checkpoint. A daemon thread, so that a process can exit when other ranks are gone."""

    def __init__(self, tensors: dict[str, PlacedTensor], writer: SafetensorsWriter, *rest: Any) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._tensors, self._writer = tensors, writer
        self._parallel, self._group, self.iteration = rest
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            write_tensors(self._tensors, self._writer, self._parallel, self._group)
        except BaseException as error:
            self.error = error
        self._tensors = {}


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
