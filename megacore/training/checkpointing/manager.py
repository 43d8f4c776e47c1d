"""Saving what a run needs to go on, while it goes on, and going on from it."""

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

from megacore.checkpoint import Checkpoint, Layout, build_manifest
from megacore.checkpoint.manifest import TOKENIZER_DIRECTORY, ParameterEntry, WeightFile, write_manifest
from megacore.checkpoint.safetensors_file import DTYPE_NAMES
from megacore.checkpoint.training_record import StoredTensor, TrainingRecord
from megacore.checkpoint.writing import copy_tokenizer
from megacore.errors import MegacoreError, OutputError
from megacore.parallel import ParallelContext, broadcast_object, is_lost_connection
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.checkpointing.final_model import ReservedOutput
from megacore.training.checkpointing.placed_tensors import PlacedTensor
from megacore.training.checkpointing.storage import SafetensorsWriter
from megacore.training.checkpointing.train_state import restore_tensors, state_tensors, write_tensors
from megacore.training.engine import Engine
from megacore.training.plan import model_specs_of
from megacore.training.progress import Progress
from megacore.training.starting_point import settings_of
from megacore.training.step_guard import StepGuard


class RunCheckpoints:
    """The training checkpoints of a run that is under way. All ranks have one, and call it alike.

    Args:
        engine: whose state is saved.
        guard: whose state is saved.
        started_from: whose description the checkpoints have.
        run_id: tells runs apart that have the same settings; of rank 0.
        datasets: a digest of each, by the key of the run file that names it.
        output: has the tokenizer's files, for as long as the run takes.

    Attributes:
        directory: where they are.
        num_failed: how many could not be saved.
        run_id: see above.
    """

    def __init__(
        self,
        engine: Engine,
        guard: StepGuard,
        started_from: Checkpoint,
        *,
        run_id: str,
        datasets: dict[str, str],
        output: ReservedOutput,
    ) -> None:
        self.directory = CheckpointDirectory.of_run(engine.run)
        self.num_failed = 0
        self._settings = engine.run.checkpoints
        self._engine = engine
        self._parallel = engine.parallel
        self._guard = guard
        self._started_from = started_from
        self.run_id = run_id
        self._datasets = datasets
        self._output = output
        self._specs = model_specs_of(started_from)
        self._copies: dict[str, Tensor] = {}
        self._saved_iteration: int | None = None
        self._under_way: _Background | None = None
        self._notes: list[str] = []
        self._open = ExitStack()
        self._is_taken = False
        # Its own, since it is used while training uses the others; on the CPU, whatever training uses.
        self._group = dist.new_group(backend="gloo", timeout=self._parallel.timeout) if self._parallel.mesh else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take the directory, and give it back when the last checkpoint is written or has failed.

        Without an interval it is taken, and created, when something is saved.
        """
        with self._open:
            if self._settings.interval is not None:
                self._take_directory()
            try:
                yield
            except Exception as error:
                # What fails the run is no reason to lose the steps before it. Ranks that wait for this one write too.
                if self._under_way is not None and not is_lost_connection(error):
                    self._under_way.join()
                raise

    def _take_directory(self) -> None:
        if self._parallel.rank == 0 and not self._is_taken:
            self._open.enter_context(self.directory.locked())
            self._is_taken = True

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Go on from ``checkpoint``, whose weights the engine has; return how far the run had come."""
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
                self._take_directory()
                for path in self.directory.set_aside_after(training.iteration):
                    self._notes.append(f"a checkpoint after iteration {training.iteration} is kept as {path}")
        return Progress.of(training, self._engine.run.optimizer)

    def is_due(self, iteration: int) -> bool:
        """Whether the run file asks for a checkpoint after ``iteration``."""
        return self._settings.interval is not None and iteration % self._settings.interval == 0

    def save(self, progress: Progress, *, waits: bool) -> Path:
        """Save a checkpoint, beside training or, if it ``waits``, at once; return where.

        Raises:
            MegacoreError: when it ``waits`` and cannot be saved. Else that is told by :meth:`notes`, and counted.
        """
        self.wait()
        out = self.directory.of_iteration(progress.iteration)
        if self._saved_iteration == progress.iteration:
            return out
        self._take_directory()
        record = TrainingRecord(progress.iteration, progress.num_samples, {}, self._state(progress))
        writes_beside = self._settings.asynchronous and not waits
        tensors = state_tensors(self._engine)
        if writes_beside:
            tensors = self._copied(tensors)
        writer = SafetensorsWriter(
            out,
            self._parallel,
            finish=lambda staging, files, stored: self._finish(staging, files, stored, record),
            published=self._published,
            is_alone=not writes_beside,
        )
        background = _Background(tensors, writer, self._parallel, self._group, progress.iteration)
        if writes_beside:
            background.start()
            self._under_way = background
        else:
            background.run()
            self._settle(background, raises=waits)
        return out

    def save_last(self, progress: Progress) -> MegacoreError | None:
        """At the end of the run, save what it could be extended from; return why not, where that fails."""
        try:
            self.save(progress, waits=True)
        except MegacoreError as error:
            return error
        except OSError as error:
            return OutputError(f"{self.directory.path}: the last checkpoint cannot be written: {error}")
        return None

    def wait(self) -> None:
        """Wait until what is being written is, or has failed."""
        if self._under_way is not None:
            background, self._under_way = self._under_way, None
            background.join()
            self._settle(background, raises=False)

    def notes(self) -> tuple[str, ...]:
        """What a person should know that was not told yet."""
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
            f"failed: {error}. Training goes on, and the earlier ones are as they were"
        )

    def _state(self, progress: Progress) -> dict[str, Any]:
        engine = self._engine
        return {
            "run_id": self.run_id,
            "settings": settings_of(engine.run),
            "datasets": self._datasets,
            "sizes": asdict(self._parallel.sizes),
            "loss_scale": None if engine.loss_scale is None else engine.loss_scale.state(),
            "guard": self._guard.state(),
            "evaluated_after": progress.evaluated_after,
            "warmup_iters": progress.warmup_iters,
        }

    def _copied(self, tensors: dict[str, PlacedTensor]) -> dict[str, PlacedTensor]:
        """Copies in memory of the CPU that is kept for the next checkpoint: new memory would take longer to get."""
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
        source, engine = self._started_from, self._engine
        tokenizer = self._output.staging / TOKENIZER_DIRECTORY
        details = {"iterations": record.iteration, "dtype": engine.run.model.dtype}
        dtype = DTYPE_NAMES[engine.held_dtype]
        manifest = build_manifest(
            source.manifest.description.after_training(source.path, run_id=self.run_id, **details),
            layout=Layout.from_stages(engine.all_stages, tp=self._parallel.tp_size),
            parameters={name: ParameterEntry(self._specs[name], dtype) for name in source.manifest.parameters},
            files=dict(sorted(files.items())),
            tokenizer=copy_tokenizer({name: tokenizer / name for name in self._output.tokenizer}, staging),
            training=TrainingRecord(record.iteration, record.num_samples, stored, record.state),
        )
        write_manifest(staging, manifest)

    def _published(self) -> None:
        """On rank 0, when a checkpoint is whole and in its place."""
        try:
            self.directory.point_to_latest()
            self.directory.keep(self._settings)
        except OSError as error:
            self._notes.append(f"{self.directory.path} could not be put in order: {error.strerror} ({error.filename})")


def run_id_of(resumed: TrainingRecord | None, parallel: ParallelContext) -> str:
    """What tells the run apart that goes on with ``resumed``, or a new one. For all ranks."""
    if resumed is not None:
        return resumed.run_id
    return broadcast_object(uuid.uuid4().hex, parallel)


class _Background(threading.Thread):
    """Writes one checkpoint. A daemon, so that a process does not wait for ranks that are gone."""

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
