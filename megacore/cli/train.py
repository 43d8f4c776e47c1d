"""``megacore train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note
from megacore.cli.options import parallel_size_option

if TYPE_CHECKING:
    from megacore.training import Step


@click.command()
@click.argument("run_file", metavar="RUN.toml", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of the run file.")
@parallel_size_option("--tp", "Tensor-parallel size; the same as --set parallel.tensor_parallel=N.", default=None)
def train(run_file: Path, overrides: tuple[str, ...], tp: int | None) -> None:
    """Train as RUN.toml says, on as many processes as it needs, and save a checkpoint.

    \b
    megacore train run.toml --tp 2 --set optimizer.lr=1e-4
    """
    from megacore.parallel import is_first_process
    from megacore.training import read_run_config, train

    if tp is not None:
        overrides = (*overrides, f"parallel.tensor_parallel={tp}")
    run = read_run_config(run_file, overrides)
    train(run, on_note=print_note, on_step=print_step)
    if is_first_process():
        click.echo(f"Saved {run.output.checkpoint}.")


def print_step(step: Step) -> None:
    """The line that tells of one step."""
    scale = "" if step.loss_scale is None else f" | loss scale {step.loss_scale:g} | skipped {step.num_skipped}"
    click.echo(
        f"iteration {step.iteration:>5}/{step.train_iters} | loss {step.loss:.6f} | lr {step.lr:.3e} | "
        f"grad norm {step.grad_norm:.4f} | {step.tokens_per_second:,.0f} tokens/s{scale}"
    )
