"""The command line. Each command is a module that parses options and prints results; the library does the work.

Importing a command imports click and nothing heavy: torch and transformers are imported when it runs. Shared options
are in ``options``, ``published_options``, ``run_options`` and ``tokenizing_options``. Start reading in ``train``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import click

from megacore.cli.convert import convert
from megacore.cli.data import data
from megacore.cli.evaluate import evaluate
from megacore.cli.export import export
from megacore.cli.generate import generate
from megacore.cli.inspect import inspect
from megacore.cli.new_plugin import new_plugin
from megacore.cli.permute_qkv import permute_qkv
from megacore.cli.plugins import plugins
from megacore.cli.report import report
from megacore.cli.split import split
from megacore.cli.tokenize import tokenize
from megacore.cli.tokenize_chat import tokenize_chat
from megacore.cli.train import train
from megacore.cli.translate import translate
from megacore.cli.verify import verify
from megacore.errors import MegacoreError, ReaderGoneError
from megacore.signals import SIGNALS, ExitOnSignal

_ERROR_DELAY = 10.0
"""Seconds that all but the first process of a node wait before they print an error and exit.

Under torchrun or srun a user's mistake usually fails every process. The launcher ends them all once one has exited,
so the first gets the time to print its error alone. If only another process fails, that one prints the error later.
"""


class CommandGroup(click.Group):
    """Prints a :class:`~megacore.errors.MegacoreError` as one message and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ReaderGoneError as error:
            ctx.exit(error.exit_code)
        except MegacoreError as error:
            if error.rank is not None:
                click.echo(f"Error on rank {error.rank}: {error}", err=True)
            elif _is_first_on_node():
                click.echo(f"Error: {error}", err=True)
            else:
                time.sleep(_ERROR_DELAY)
                click.echo(f"Error on rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)
        except PermissionError as error:
            click.echo(f"Error: {error.strerror}: {error.filename}", err=True)
            ctx.exit(2)


def _is_first_on_node() -> bool:
    """Return whether this is the first process of torchrun or srun on this machine, or runs without either."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="megacore", prog_name="megacore")
def cli() -> None:
    """Tokenize data, and convert, verify, reshard, train, evaluate and export large language models."""


for command in (
    tokenize, tokenize_chat, data, convert, verify, split, train, evaluate, report, generate, export, translate,
    permute_qkv, inspect,
    plugins, new_plugin,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """The ``megacore`` program. SIGTERM and SIGINT unwind the stack, so that half-written output is removed."""
    exit_on_signal = ExitOnSignal()
    for number in SIGNALS:
        signal.signal(number, exit_on_signal)
    try:
        cli()
    except BaseException as error:
        if exit_on_signal.received:  # a library may have turned the exit into an error of its own
            sys.exit(exit_on_signal.exit_code)
        if isinstance(error, SystemExit) and "RANK" in os.environ:  # started by torchrun or srun
            from megacore.parallel import exit_process

            exit_process(int(error.code or 0))
        raise
    finally:
        if not exit_on_signal.ignores_signals:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)  # nothing is left to unwind while the interpreter ends
