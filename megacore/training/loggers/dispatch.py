"""Reporting a run to its directory and its loggers, none of which can end it."""

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
from typing import Any, Generic, TypeVar

from megacore.errors import ConfigError
from megacore.parallel import ParallelContext
from megacore.runs import MetricsFile, RunDirectory
from megacore.training.config import RunConfig, explicit_tables
from megacore.training.loggers import LoggedRun, check_loggers, open_logger
from megacore.training.loggers.environment import describe_versions, devices_of_all
from megacore.training.step_metrics import Evaluation, Step

log = logging.getLogger(__name__)

Target = TypeVar("Target")

_RETRY_INTERVAL = 60.0
"""Seconds between two attempts after a failure: each may wait for a network."""

_SHUTDOWN_TIMEOUT = 60.0
"""Seconds that the loggers have to finish at the end of the run; trackio waits up to 30 for its server."""

_MAX_QUEUED = 10_000
"""Number of entries that a logger may be behind."""

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR)|AUTHORIZ", re.IGNORECASE)
"""Pattern for the names of environment variables whose values are never shown; ``GIT_AUTHOR_NAME`` does not match."""


def check_run_log(run: RunConfig, *, resumed_run_id: str | None = None) -> None:
    """Check the loggers and the run directory, before anything is loaded.

    Args:
        run: The run file.
        resumed_run_id: The identifier of the run that is resumed; ``None`` for a new run.

    Raises:
        ConfigError: when a logger is not available.
        OutputError: when the directory belongs to another run.
    """
    check_loggers(run.logging.loggers, directory=run.output.directory)
    if run.output.directory is not None:
        RunDirectory(run.output.directory).check(explicit_tables(run), resumed_run_id=resumed_run_id)


def has_loggers(run: RunConfig) -> bool:
    """Return whether the steps of ``run`` are reported to a logger or a run directory."""
    return bool(run.logging.loggers) or run.output.directory is not None


@contextmanager
def open_run_log(
    run: RunConfig, parallel: ParallelContext, *, iteration: int = 0, about_start: Mapping[str, Any] | None = None
) -> Iterator[RunLog]:
    """Open the log of a run that starts after ``iteration``. For all ranks; only rank 0 reports anything.

    ``about_start`` is kept in the run directory, beside the software versions.

    Raises:
        OutputError: when the run directory cannot be written, or another run is writing it.
        ConfigError: when a logger could not start. In a run that resumes, that is a warning instead.
    """
    if not has_loggers(run):
        yield RunLog()
        return
    devices = devices_of_all(parallel)
    if parallel.rank > 0:
        yield RunLog()
        return
    tables = explicit_tables(run)
    run_log = RunLog(log_interval=run.logging.log_interval)
    timeout = _SHUTDOWN_TIMEOUT
    if parallel.timeout is not None:
        timeout = min(timeout, parallel.timeout.total_seconds() / 2)  # the other ranks wait for this one
    with ExitStack() as opened:
        opened.callback(_close, run_log.loggers, timeout=timeout)
        if run.output.directory is not None:
            directory = RunDirectory(run.output.directory)
            versions = describe_versions() | {"layout": str(parallel.sizes), "devices": devices}
            directory.create(tables, versions | dict(about_start or {}), iteration=iteration)
            run_log.file = Guarded("metrics.jsonl", MetricsFile(directory.metrics_file))
            opened.callback(run_log.file.attempt, "close", run_log.file.target.close)
            run_log.file.target.start(iteration)
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
                problem = f"the logger {name} could not start: {_described(error)}"
                if iteration == 0:
                    raise ConfigError(f"{problem}; take it out of logging.loggers to train without it") from error
                log.warning("Note: %s. Training continues without it.", problem)
                continue
            run_log.loggers.append(logger)
        yield run_log


class Guarded(Generic[Target]):
    """A receiver of reports whose failures are warnings.

    Attributes:
        name: The name in the warning.
        target: The receiver.
    """

    def __init__(self, name: str, target: Target) -> None:
        self.name = name
        self.target = target
        self._has_warned = False
        self._next_attempt = -math.inf

    def attempt(self, what: str, report: Callable[[], None]) -> None:
        """Call ``report``. After a failure, which is a warning once, calls are left out for a minute.

        Args:
            what: What is reported, ``"iteration 7"`` for example; ``"close"`` is never left out.
            report: The call.
        """
        if what != "close" and time.monotonic() < self._next_attempt:
            return
        try:
            report()
        except Exception as error:  # whatever its library raises; training is worth more than its log
            self._next_attempt = time.monotonic() + _RETRY_INTERVAL
            if not self._has_warned:
                log.warning(
                    "Note: %s failed at %s: %s. Training continues; it is tried again once a minute, without "
                    "further warnings.",
                    self.name, what, _described(error),
                )  # fmt: skip
            self._has_warned = True


class LoggerThread(threading.Thread):
    """A logger that is opened, called and closed in a thread of its own, so that it cannot block the training.

    All calls come from one thread, since libraries may identify a run by the thread that began it, as trackio does. It
    is a daemon, so that the process can end while a logger hangs; the threads of concurrent.futures are waited for.

    Attributes:
        waiting: The queued entries, values and their iteration; ``None`` is the end.
    """

    def __init__(self, name: str, about: LoggedRun) -> None:
        super().__init__(name=name, daemon=True)
        self.waiting: Queue[tuple[Mapping[str, float], int] | None] = Queue()
        self._about = about
        self._opened: Future[None] = Future()
        self._has_warned = False

    def open(self) -> None:
        """Start the logger and wait until it is open. Exceptions of its library are not caught."""
        self.start()
        self._opened.result()

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        """Queue an entry for the logger; drop it if the logger is far behind."""
        if self.waiting.qsize() < _MAX_QUEUED:
            self.waiting.put((values, iteration))
        elif not self._has_warned:
            self._has_warned = True
            log.warning(
                "Note: %s is %d entries behind at iteration %d. Training continues; further entries are lost, without "
                "another warning.",
                self.name, _MAX_QUEUED, iteration,
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


def _close(loggers: Iterable[LoggerThread], *, timeout: float) -> None:
    """Wait up to ``timeout`` seconds for the loggers to finish."""
    for logger in loggers:
        logger.waiting.put(None)
    deadline = time.monotonic() + timeout
    for logger in loggers:
        logger.join(max(0.0, deadline - time.monotonic()))
        if logger.is_alive():
            log.warning(
                "Note: %s has not finished within %g seconds after the run, and is not waited for any longer: entries "
                "that it has not received or passed on are lost.",
                logger.name, timeout,
            )  # fmt: skip


class RunLog:
    """The receivers of the reports of a run.

    Attributes:
        file: The metrics file of the run directory, for every step; ``None`` without one.
        loggers: The loggers, for every ``log_interval``-th step; see :meth:`Step.is_logged`.
    """

    def __init__(self, *, log_interval: int = 1) -> None:
        self.file: Guarded[MetricsFile] | None = None
        self.loggers: list[LoggerThread] = []
        self._log_interval = log_interval

    def step(self, step: Step) -> None:
        """Report a step."""
        if self.file is None and not self.loggers:
            return
        values = values_of(step)
        what = f"iteration {step.iteration}"
        if self.file is not None:
            self.file.attempt(what, partial(self.file.target.step, step.iteration, values))
        if step.is_logged(self._log_interval):
            self._log_values({f"train/{name}": value for name, value in values.items()}, step.iteration)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Report an evaluation."""
        iteration, split, values = evaluation.iteration, evaluation.split, evaluation.values
        if self.file is not None:
            report = partial(self.file.target.evaluation, iteration, split, values)
            self.file.attempt(f"iteration {iteration}", report)
        self._log_values({f"{split}/{name}": value for name, value in values.items()}, iteration)

    def _log_values(self, values: Mapping[str, float], iteration: int) -> None:
        for logger in self.loggers:
            logger.log(values, iteration=iteration)


def values_of(step: Step) -> dict[str, float]:
    """Return the values of a step, by their names in ``metrics.jsonl`` and the loggers."""
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
    """Return the first line of an error, with the secrets of the environment replaced by their names."""
    first_line = next(iter(str(error).splitlines()), "")
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 8:
            first_line = first_line.replace(value, f"<{name}>")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
