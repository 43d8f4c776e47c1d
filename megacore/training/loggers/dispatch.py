"""Telling how a run goes: its directory and its loggers, none of which can end it."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import Queue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megacore.errors import ConfigError
from megacore.parallel import ParallelContext
from megacore.runs import MetricsFile, RunDirectory
from megacore.training.config.resolved_tables import resolved_tables
from megacore.training.config.run_config import RunConfig
from megacore.training.loggers import LoggedRun, check_loggers, open_logger
from megacore.training.loggers.environment import describe_versions, devices_of_all
from megacore.training.step_metrics import Step

if TYPE_CHECKING:
    from megacore.training.evaluation.evaluator import Evaluation

log = logging.getLogger(__name__)

Target = TypeVar("Target")

_PAUSE = 60.0
"""Seconds in which somebody who could not be told is left alone: each attempt may wait for a network."""

_PATIENCE = 60.0
"""Seconds in which the loggers may finish when the run has ended; trackio waits up to 30 for its server."""

_MOST_WAITING = 10_000
"""Entries that a logger may be behind."""

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR)|AUTHORIZ", re.IGNORECASE)
"""In the name of an environment variable whose value is never shown; not in ``GIT_AUTHOR_NAME``."""


def check_run_log(run: RunConfig, *, resumed_run_id: str | None = None) -> None:
    """Refuse what could not be told of the run, before anything is loaded.

    Args:
        run: to be told of.
        resumed_run_id: of the run that it goes on with, if it does.

    Raises:
        ConfigError: a logger is not there.
        OutputError: the directory is another run's.
    """
    check_loggers(run.logging.loggers, directory=run.output.directory)
    if run.output.directory is not None:
        RunDirectory(run.output.directory).check(resolved_tables(run), resumed_run_id=resumed_run_id)


def is_watched(run: RunConfig) -> bool:
    """Whether anybody is told of the steps of ``run``, beside who called for it."""
    return bool(run.logging.loggers) or run.output.directory is not None


@contextmanager
def opened_log(
    run: RunConfig, parallel: ParallelContext, *, iteration: int = 0, about_start: Mapping[str, Any] | None = None
) -> Iterator[RunLog]:
    """The log of a run that starts after ``iteration``. For all ranks; those after the first tell nobody.

    ``about_start`` is kept in the run's directory, beside the versions.

    Raises:
        OutputError: the run's directory cannot be written, or another run is writing it.
        ConfigError: a logger could not start. In a run that goes on, that is a warning instead.
    """
    if not is_watched(run):
        yield RunLog()
        return
    devices = devices_of_all(parallel)
    if parallel.rank > 0:
        yield RunLog()
        return
    tables = resolved_tables(run)
    told = RunLog(log_interval=run.logging.log_interval)
    # Half as long as the other ranks wait for this one.
    patience = _PATIENCE if parallel.timeout is None else min(_PATIENCE, parallel.timeout.total_seconds() / 2)
    with ExitStack() as opened:
        opened.callback(_close, told.loggers, patience=patience)
        if run.output.directory is not None:
            directory = RunDirectory(run.output.directory)
            versions = describe_versions() | {"layout": str(parallel.sizes), "devices": devices}
            directory.create(tables, versions | dict(about_start or {}), iteration=iteration)
            told.file = Guarded("metrics.jsonl", MetricsFile(directory.metrics_file))
            opened.callback(told.file.attempt, "close", told.file.target.close)
            told.file.target.start(iteration)
        about = LoggedRun(
            project=run.logging.project,
            name=run.logging.name or (run.output.directory or run.output.checkpoint).name,
            directory=run.output.directory,
            settings=tables,
            iteration=iteration,
        )
        for name in run.logging.loggers:
            logger = LoggerThread(name, about)
            try:
                logger.open()
            except Exception as error:  # whatever its library raises
                said = f"the logger {name} could not start: {_described(error)}"
                if iteration == 0:
                    raise ConfigError(f"{said}; take it out of logging.loggers to train without it") from error
                log.warning("Note: %s. Training goes on without it.", said)
                continue
            told.loggers.append(logger)
        yield told


class Guarded(Generic[Target]):
    """Somebody who is told of a run, and whose failures are warnings.

    Attributes:
        name: for the warning.
        target: who it is.
    """

    def __init__(self, name: str, target: Target) -> None:
        self.name = name
        self.target = target
        self._has_warned = False
        self._left_alone_until = -math.inf

    def attempt(self, what: str, tell: Callable[[], None]) -> None:
        """Call ``tell``. After a failure, which is a warning once, no more is told for a minute.

        Args:
            what: is told, ``"iteration 7"`` for example; ``"close"`` is told all the same.
        """
        if what != "close" and time.monotonic() < self._left_alone_until:
            return
        try:
            tell()
        except Exception as error:  # whatever its library raises; training is worth more than its log
            self._left_alone_until = time.monotonic() + _PAUSE
            if not self._has_warned:
                log.warning(
                    "Note: %s failed at %s: %s. Training goes on; it is tried again once a minute, and not told of "
                    "again.",
                    self.name, what, _described(error),
                )  # fmt: skip
            self._has_warned = True


class LoggerThread(threading.Thread):
    """A logger that is opened, told and closed in a thread of its own, so that one that hangs holds up nobody.

    All of it in one thread, since libraries may know a run by the thread that it was begun in, as trackio does; and in
    a daemon, so that the process can end.

    Attributes:
        waiting: what it is still to be told, values and their iteration; ``None`` is the end.
    """

    def __init__(self, name: str, about: LoggedRun) -> None:
        super().__init__(name=name, daemon=True)
        self.waiting: Queue[tuple[Mapping[str, float], int] | None] = Queue()
        self._about = about
        self._opened: Future[None] = Future()
        self._has_warned = False

    def open(self) -> None:
        """Start the logger, and wait for it. What its library raises is not caught."""
        self.start()
        self._opened.result()

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        """Let the logger be told when it has time; not at all where it is far behind."""
        if self.waiting.qsize() < _MOST_WAITING:
            self.waiting.put((values, iteration))
        elif not self._has_warned:
            self._has_warned = True
            log.warning(
                "Note: %s is %d entries behind at iteration %d. Training goes on; what it has no room for is lost, and "
                "not told of again.",
                self.name, _MOST_WAITING, iteration,
            )  # fmt: skip

    def run(self) -> None:
        try:
            logger = Guarded(self.name, open_logger(self.name, self._about))
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        while (entry := self.waiting.get()) is not None:
            values, iteration = entry
            logger.attempt(f"iteration {iteration}", partial(logger.target.log, values, iteration=iteration))
            self.waiting.task_done()
        logger.attempt("close", logger.target.close)


def _close(loggers: Iterable[LoggerThread], *, patience: float) -> None:
    """Let the loggers finish, for so many seconds."""
    for logger in loggers:
        logger.waiting.put(None)
    ends = time.monotonic() + patience
    for logger in loggers:
        logger.join(max(0.0, ends - time.monotonic()))
        if logger.is_alive():
            log.warning(
                "Note: %s has not finished within %g seconds after the run, and is not waited for any longer: what it "
                "was not told yet, or has not passed on, is lost.",
                logger.name, patience,
            )  # fmt: skip


class RunLog:
    """What is told of a run, and whom.

    Attributes:
        file: the metrics of the run's directory, if it has one; of every step.
        loggers: are told of every ``log_interval``-th step; see :meth:`Step.is_logged`.
    """

    def __init__(self, *, log_interval: int = 1) -> None:
        self.file: Guarded[MetricsFile] | None = None
        self.loggers: list[LoggerThread] = []
        self._log_interval = log_interval

    def step(self, step: Step) -> None:
        """Tell of a step."""
        values = values_of(step)
        what = f"iteration {step.iteration}"
        if self.file is not None:
            self.file.attempt(what, partial(self.file.target.step, step.iteration, values))
        if step.is_logged(self._log_interval):
            self._tell_loggers({f"train/{name}": value for name, value in values.items()}, step.iteration)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Tell of an evaluation."""
        iteration, split, values = evaluation.iteration, evaluation.split, evaluation.values
        if self.file is not None:
            tell = partial(self.file.target.evaluation, iteration, split, values)
            self.file.attempt(f"iteration {iteration}", tell)
        self._tell_loggers({f"{split}/{name}": value for name, value in values.items()}, iteration)

    def _tell_loggers(self, values: Mapping[str, float], iteration: int) -> None:
        for logger in self.loggers:
            logger.log(values, iteration=iteration)


def values_of(step: Step) -> dict[str, float]:
    """What is known of a step, by the names that ``metrics.jsonl`` and the loggers have for it."""
    values = {
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "tokens": step.num_tokens,
        "seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "flops_per_second": step.flops_per_second,
    }
    if step.peak_flops_per_second is not None:
        values["share_of_peak"] = step.flops_per_second / step.peak_flops_per_second
    if step.loss_scale is not None:
        values["loss_scale"] = step.loss_scale
    if step.num_skipped or step.loss_scale is not None:
        values["num_skipped"] = step.num_skipped
    return values


def _described(error: Exception) -> str:
    """The first line of an error, without what the environment keeps secret."""
    first_line = next(iter(str(error).splitlines()), "")
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 8:
            first_line = first_line.replace(value, f"<{name}>")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
